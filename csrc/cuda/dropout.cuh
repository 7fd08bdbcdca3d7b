// Dropout on the device: Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). Which counter belongs to which element stands in docs/design.md, section 4; every
// backend draws the same words.
#pragma once
#include <stdint.h>

#include "csrc/cuda/dropout.h"

namespace rk::cuda {

struct PhiloxKey {
    uint32_t low, high;
};

// Reads the seed from device memory: 8 bytes that every thread of the grid reads, so one access per warp,
// from L2.
__device__ inline PhiloxKey philox_key(const Dropout& dropout) {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

// The four words of counter (group, row, plane, 0): those of the columns 4 * group ... 4 * group + 3.
__device__ inline uint4 philox(const PhiloxKey& key, uint32_t group, uint32_t row, uint32_t plane) {
    uint4 c = make_uint4(group, row, plane, 0u);
    uint32_t k0 = key.low, k1 = key.high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
        c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// What the four columns of a group are multiplied by: 0 where dropped, 1 / (1 - p) where kept.
__device__ inline void dropout_factors(float (&factors)[4], const Dropout& dropout, const PhiloxKey& key,
                                       uint32_t group, uint32_t row, uint32_t plane) {
    const uint4 words = philox(key, group, row, plane);
    factors[0] = words.x >= dropout.threshold ? dropout.scale : 0.0f;
    factors[1] = words.y >= dropout.threshold ? dropout.scale : 0.0f;
    factors[2] = words.z >= dropout.threshold ? dropout.scale : 0.0f;
    factors[3] = words.w >= dropout.threshold ? dropout.scale : 0.0f;
}

}  // namespace rk::cuda
