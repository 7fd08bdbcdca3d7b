// The emulation's csrc/cuda/tensor_map.cuh: what cuTensorMapEncodeTiled demands (cuda.h) is checked, and the
// map holds what copy_box in ptx_sm90.cuh needs.
#pragma once
#include <cuda.h>

#include <stdexcept>
#include <string>

namespace rk::cuda {

struct TensorMap3d {
    const void* data;
    uint64_t sizes[3];
    uint64_t strides[2];
    uint32_t box[3];
    bool bfloat16;
};

}  // namespace rk::cuda

namespace emulation {

constexpr uint64_t kTensorMap = 0x70616d726f736e74;  // marks what encode() made

struct EncodedMap {
    uint64_t mark;
    rk::cuda::TensorMap3d tensor;
    int swizzle_bytes;
};
static_assert(sizeof(EncodedMap) <= sizeof(CUtensorMap), "fits in the opaque object");

}  // namespace emulation

namespace rk::cuda {

inline CUtensorMap encode(const TensorMap3d& t) {
    const auto demand = [](bool holds, const char* what) {
        if (!holds) throw std::runtime_error(std::string("emulation: cuTensorMapEncodeTiled: ") + what);
    };
    demand(t.data != nullptr && reinterpret_cast<uintptr_t>(t.data) % 16 == 0, "address");
    for (const uint64_t size : t.sizes) demand(size > 0 && size <= uint64_t{1} << 32, "globalDim");
    for (const uint64_t stride : t.strides)
        demand(stride % 16 == 0 && stride < uint64_t{1} << 40, "globalStrides");
    demand(t.strides[0] >= 2 * t.sizes[0] && t.strides[1] >= t.strides[0], "globalStrides overlap");
    for (const uint32_t size : t.box) demand(size > 0 && size <= 256, "boxDim");
    const uint32_t row = 2 * t.box[0];
    demand(row == 64 || row == 128, "boxDim[0]: as long as the swizzle");
    const emulation::EncodedMap encoded{emulation::kTensorMap, t, static_cast<int>(row)};
    CUtensorMap map{};
    std::memcpy(&map, &encoded, sizeof(encoded));
    return map;
}

}  // namespace rk::cuda
