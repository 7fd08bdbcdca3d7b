// What CUTLASS's headers name of CUDA and our kernels do not use: declared, so that they compile; included
// before them (g++ -include). The headers in cutlass/ stand before CUTLASS's own on the include path, in
// place of those that hold PTX.
#pragma once
#include <cstddef>

// Those by which a thread finds its place in the block are 0 outside of nvcc's device code: these instead.
#define canonical_lane_idx canonical_lane_idx_of_the_host
#define canonical_warp_idx canonical_warp_idx_of_the_host
#define canonical_warp_idx_sync canonical_warp_idx_sync_of_the_host
#include "cutlass/cutlass.h"
#undef canonical_lane_idx
#undef canonical_warp_idx
#undef canonical_warp_idx_sync

namespace cutlass {
inline int canonical_lane_idx() {
    return threadIdx.x % 32;
}
inline int canonical_warp_idx() {
    return threadIdx.x / 32;
}
inline int canonical_warp_idx_sync() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
}
}  // namespace cutlass

int __syncthreads_and(int);
int __dp4a(int, int, int);
unsigned __dp4a(unsigned, unsigned, unsigned);
unsigned __byte_perm(unsigned, unsigned, unsigned);
__half2 __hfma2(__half2, __half2, __half2);
__half2 __hadd2(__half2, __half2);
__half2 __hmul2(__half2, __half2);

namespace cutlass::arch {
int SmId();
int LaneId();
template <int Bytes>
void shared_load(void*, uint32_t);
}  // namespace cutlass::arch
