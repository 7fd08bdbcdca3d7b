// Two kernels with a fault each, in the namespace of ours: compute-sanitizer, set to look at that namespace alone, has
// to find them. Else that it finds nothing in ours would say nothing.
#include <cstdio>
#include <cstring>

namespace rk::cuda {
namespace {

__global__ void writes_out_of_bounds(int* p) {
    p[(1 << 20) + threadIdx.x] = 1;
}

__global__ void reads_without_a_barrier(int* p) {
    __shared__ int shared[64];
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    p[threadIdx.x] = shared[63 - threadIdx.x];
}

}  // namespace
}  // namespace rk::cuda

int main(int count, char** arguments) {
    int* p = nullptr;
    if (count != 2 || cudaMalloc(&p, 64 * sizeof(int)) != cudaSuccess) return 1;
    if (std::strcmp(arguments[1], "memcheck") == 0)
        rk::cuda::writes_out_of_bounds<<<1, 1>>>(p);
    else
        rk::cuda::reads_without_a_barrier<<<1, 64>>>(p);
    std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
    return 0;
}
