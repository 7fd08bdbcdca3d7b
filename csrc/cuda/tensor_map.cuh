// Tensor maps: what tells the bulk tensor copies of Hopper how a tensor lies in global memory. Host code. The
// emulation in tests/cuda_emulation has a header of the same name: include it as <tensor_map.cuh>.
#pragma once
#include <cuda.h>
#include <stdint.h>

#include <launch.cuh>
#include <stdexcept>
#include <string>

namespace rk::cuda {

// Of a 3-dimensional tensor of 2-byte elements, innermost dimension first and contiguous. The rest in memory:
// 16-byte multiples. Boxes are swizzled over their innermost dimension, of 64 or 128 bytes.
struct TensorMap3d {
    const void* data;
    uint64_t sizes[3];
    uint64_t strides[2];  // of dimensions 1 and 2, in bytes
    uint32_t box[3];
    bool bfloat16;  // or float16
};

inline CUtensorMap encode(const TensorMap3d& t) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    // From the driver by name: the library must load where there is none, so it does not link with it.
    static const Encode encode_tiled = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                               &found),
              "cuTensorMapEncodeTiled");
        if (found != cudaDriverEntryPointSuccess)
            throw std::runtime_error("roberta_kernels: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(function);
    }();
    CUtensorMap map;
    const cuuint64_t sizes[3] = {t.sizes[0], t.sizes[1], t.sizes[2]};
    const cuuint64_t strides[2] = {t.strides[0], t.strides[1]};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult status =
        encode_tiled(&map, t.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                     const_cast<void*>(t.data), sizes, strides, t.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     2 * t.box[0] == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("roberta_kernels: cuTensorMapEncodeTiled failed with " +
                                 std::to_string(static_cast<int>(status)));
    return map;
}

}  // namespace rk::cuda
