// Integers, and the one way in which kernels share work out.
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

// f(task) for each of `count` tasks, on at most `threads` threads. Each has a share of neighbouring tasks, so that what it
// asked for ahead is its own, and takes one after the other; then it helps with the other shares: a thread that is slow,
// or late, does less. What a task computes must not depend on who runs it.
template <class F>
inline void parallel_tasks(int64_t count, int64_t threads, const F& f) {
    constexpr int64_t kMostShares = 64;
    const int64_t shares = min64(kMostShares, min64(threads, count));
    struct alignas(64) Share {  // a cache line of its own
        int64_t next, end;
    } share[kMostShares];
    for (int64_t i = 0; i < shares; ++i) share[i] = {count * i / shares, count * (i + 1) / shares};
    parallel_for(0, min64(threads, count), 1, [&](int64_t thread, int64_t) {
        for (int64_t i = 0; i < shares; ++i) {
            Share& from = share[(thread + i) % shares];
            for (;;) {
                const int64_t task = __atomic_fetch_add(&from.next, 1, __ATOMIC_RELAXED);
                if (task >= from.end) break;
                f(task);
            }
        }
    });
}

}  // namespace rk::cpu::RK_CPU_ISA
