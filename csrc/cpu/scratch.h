// Memory that a thread keeps between calls, aligned to cache lines. No kernel allocates on its hot path.
#pragma once
#include <stdint.h>
#include <stdlib.h>

namespace rk::cpu::RK_CPU_ISA {

struct Scratch {
    char* data = nullptr;
    size_t size = 0, used = 0;

    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { free(data); }

    // Starts over with room for `bytes`, plus alignment, in at most `pieces` pieces.
    void reset(size_t bytes, int pieces) {
        bytes += 64 * static_cast<size_t>(pieces);
        used = 0;
        if (bytes <= size) return;
        free(data);
        size = (bytes + 4095) / 4096 * 4096;
        data = static_cast<char*>(aligned_alloc(64, size));
        if (data == nullptr) abort();
    }
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(data + used);
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

}  // namespace rk::cpu::RK_CPU_ISA
