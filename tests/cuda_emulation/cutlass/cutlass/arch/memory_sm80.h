// In place of CUTLASS's: cp.async by its twin in the emulation's ptx.cuh, which copies at the wait and not
// before.
#pragma once
#include <ptx.cuh>

#include "cutlass/arch/cache_operation.h"
#include "cutlass/cutlass.h"

namespace cutlass::arch {

template <int SizeInBytes, CacheOperation::Kind cache_op = CacheOperation::Always>
struct cp_async {
    cp_async(void* shared, const void* global, bool valid = true) {
        if (valid) rk::cuda::ptx::copy_async<SizeInBytes>(shared, global, true);
    }
};

template <int SizeInBytes, CacheOperation::Kind cache_op = CacheOperation::Always>
struct cp_async_zfill {
    cp_async_zfill(void* shared, const void* global, bool valid) {
        rk::cuda::ptx::copy_async<SizeInBytes>(shared, global, valid);
    }
};

template <int SizeInBytes, CacheOperation::Kind cache_op = CacheOperation::Always>
struct cp_async_nan;
template <typename Element, bool IsHermitianData = false>
struct cp_async_diag;

inline void cp_async_fence() {
    rk::cuda::ptx::copy_async_commit();
}

template <int N>
inline void cp_async_wait() {
    if (N == 0) cp_async_fence();  // cp.async.wait_all: those without a group too
    rk::cuda::ptx::copy_async_wait<N>();
}

}  // namespace cutlass::arch
