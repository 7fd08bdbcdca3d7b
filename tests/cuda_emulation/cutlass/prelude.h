// What CUTLASS's headers name of CUDA and our kernels do not use: declared, so that they compile; included
// before them (g++ -include). The headers in cutlass/ stand before CUTLASS's own on the include path, in place
// of those that hold PTX.
#pragma once
#include <cstddef>

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
