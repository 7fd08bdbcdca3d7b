// Whole numbers, and the one way in which kernels share work out.
#pragma once
#include <stdint.h>

#include "csrc/cpu/dispatch.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
constexpr int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t n, int64_t to) {
    return ceil_div(n, to) * to;
}

// f(task) for each of `count` tasks, on at most `threads` threads, each of which takes one task after the
// other: one that is slow, or late, takes fewer. What a task computes must not depend on who runs it.
template <class F>
inline void parallel_tasks(int64_t count, int64_t threads, const F& f) {
    int64_t next = 0;
    parallel_for(0, min64(threads, count), 1, [&](int64_t, int64_t) {
        for (;;) {
            const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= count) return;
            f(task);
        }
    });
}

}  // namespace rk::cpu::RK_CPU_ISA
