// Weights that are packed once: what they are kept as, and what stands before them in memory. N and K: rows
// and columns of a weight.
#pragma once
#include <cstdint>

namespace rk::cpu {

// What a weight is kept as. float32, bfloat16 and int8 are multiplied with float32 rows, in float32;
// int8_dynamic with rows that are rounded to integers in the call, in integers.
enum class WeightKind : int32_t { float32, bfloat16, int8, int8_dynamic };
constexpr const char* kWeightKinds[] = {"float32", "bfloat16", "int8", "int8-dynamic"};
constexpr int kWeightKindCount = 4;

// A packed weight in memory starts with this; the layout of what follows is the instruction set's own.
struct PackedHeader {
    uint64_t magic;
    int32_t kind, isa;
    int64_t rows, columns;  // of the weight: N, K
    int64_t panels_at;      // bytes from the start of the header
};
constexpr uint64_t kPackedMagic = 0x314b43415052524bull;

struct PackWeightArgs {
    const float* weight;  // [N, K], contiguous
    int64_t rows, columns;
    WeightKind kind;
    char* panels;    // written, unless null
    int64_t* bytes;  // of `panels`; written
};

struct PackedWeight {
    const char* panels;
    int64_t rows, columns;
    WeightKind kind;
};

}  // namespace rk::cpu
