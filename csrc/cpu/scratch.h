// Memory that a thread keeps between calls, aligned to cache lines: no kernel allocates on its hot path, and
// no call pays for page faults.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#    include <sys/mman.h>
#endif

namespace rk::cpu::RK_CPU_ISA {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(data_); }

    // Starts over, with room for `bytes` in at most `pieces` pieces. What was there before is lost.
    void reset(size_t bytes, int pieces) {
        bytes += 64 * static_cast<size_t>(pieces);
        used_ = 0;
        if (bytes <= size_) return;
        free(data_);
        const size_t page = bytes < kHugePage / 4 ? 4096 : kHugePage;
        size_ = (bytes + page - 1) / page * page;
        data_ = static_cast<char*>(aligned_alloc(page, size_));
        if (data_ == nullptr) abort();
#if defined(MADV_HUGEPAGE)
        if (page == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);  // advice: not needed for the result
#endif
    }
    // The next piece.
    template <class T>
    T* take(int64_t count) {
        T* const piece = reinterpret_cast<T*>(data_ + used_);
        used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    // All of it as one piece.
    float* words(int64_t count) {
        reset(static_cast<size_t>(count) * 4, 1);
        return take<float>(count);
    }

  private:
    // Operands that are walked along K touch another page every few cycles: with pages of 4 KB products on tiles took a
    // tenth longer.
    static constexpr size_t kHugePage = 2 << 20;
    char* data_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

// The calling thread's own, one for each use.
enum class Use { column_block, left_operand, activation, sums, encoder, right_operand, feed_forward };
constexpr int kUses = 7;
inline Scratch& thread_scratch(Use use) {
    static thread_local Scratch scratch[kUses];
    return scratch[static_cast<int>(use)];
}

}  // namespace rk::cpu::RK_CPU_ISA
