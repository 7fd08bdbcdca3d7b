// Dropout inside attention, where queries lie in the lanes of a vector (docs/design.md, section 4).
#pragma once
#include "csrc/cpu/dropout.h"
#include "csrc/cpu/simd.h"

namespace rk::cpu::RK_CPU_ISA {

// Dropout factors of one vector of queries down the keys: four adjacent keys share a Philox block.
struct KeyDropout {
    Dropout dropout;
    vu32 row;
    uint32_t head;
    int64_t block = -1;
    vu32 words[4];

    KeyDropout(const Dropout& d, int64_t first_row, int64_t h)
        : dropout(d),
          row((vu32)lane_index() + static_cast<uint32_t>(first_row)),
          head(static_cast<uint32_t>(h)),
          words{} {}
    vf32 multiplier(int64_t key) {
        if (key >> 2 != block) {
            block = key >> 2;
            philox(set1(static_cast<uint32_t>(block)), row, set1(head), dropout.key0, dropout.key1, words);
        }
        const vi32 keep = words[key & 3] >= set1(dropout.threshold);
        return (vf32)(keep & (vi32)set1(dropout.scale));
    }
};

}  // namespace rk::cpu::RK_CPU_ISA
