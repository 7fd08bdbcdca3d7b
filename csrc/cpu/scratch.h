// Memory that a thread keeps between calls, aligned to cache lines: no kernel allocates on its hot path, and
// no call pays for page faults.
#pragma once
#include <stdint.h>
#include <stdlib.h>

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
        size_ = (bytes + 4095) / 4096 * 4096;
        data_ = static_cast<char*>(aligned_alloc(4096, size_));
        if (data_ == nullptr) abort();
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
