// The feed-forward block as its kernels see it: filled in by gelu_ffn_binding.cpp. Plain C++.
//
// T: tokens, H: hidden size, F: feed-forward size, O: output size. Matrices are contiguous, of one dtype.
//
// The first product and the product of backward that goes through GELU come in three variants:
//   portable  torch's GEMM, then one elementwise kernel (gelu_ffn_elementwise.cu); any dtype, any size
//   sm80      CUTLASS 2.x, mma.sync, GELU in the epilogue (gelu_ffn_sm80.cu); sm_80 and later
//   sm90      CUTLASS 3.x, TMA and wgmma, GELU in the epilogue (gelu_ffn_sm90.cuh); sm_90a alone
// gelu_ffn_path chooses among them for a call. All other products are torch's GEMM.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include "csrc/cuda/column_sum.h"
#include "csrc/cuda/dtype.h"
#include "csrc/cuda/variants.h"

namespace rk::cuda {

// activation = gelu(preactivation), elementwise.
struct GeluForward {
    const void* preactivation;  // [count]
    void* activation;           // [count]; may be the pre-activation itself
    int64_t count;
    Dtype dtype;
    bool tanh;
    cudaStream_t stream;
};
void gelu_forward(const GeluForward& args);

// From the gradient of the activation: that of the pre-activation, its column sums, and the activation again.
struct GeluBackward {
    const void* grad_activation;  // [T, F]
    const void* preactivation;    // [T, F]
    void* grad_preactivation;     // [T, F]; may be grad_activation itself
    void* activation;             // [T, F]
    Partials partials;            // of F columns and sum_blocks(T) rows
    int64_t tokens, inner;
    Dtype dtype;
    bool tanh;
    cudaStream_t stream;
};
void gelu_backward(const GeluBackward& args);

struct FusedDevice {
    int multiprocessors;
    cudaStream_t stream;
};

// activation = gelu(x w_in^T + b_in), in one kernel.
struct FusedForward {
    const void* x;        // [T, H]
    const void* w_in;     // [F, H]
    const void* b_in;     // [F]
    void* activation;     // [T, F]
    void* preactivation;  // [T, F], or null
    int64_t tokens, hidden, inner;
    Dtype dtype;
    bool tanh;
    FusedDevice device;
};

// grad_preactivation = (grad_out w_out) * gelu'(preactivation) with its column sums, and the activation
// again, in one kernel.
struct FusedBackward {
    const void* grad_out;       // [T, O]
    const void* w_out;          // [O, F]
    const void* preactivation;  // [T, F]
    void* grad_preactivation;   // [T, F]
    void* activation;           // [T, F]
    Partials partials;          // fused_partials(variant, T, F)
    int64_t tokens, outer, inner;
    Dtype dtype;
    bool tanh;
    FusedDevice device;
};

void fused_forward_sm80(const FusedForward& args);
void fused_backward_sm80(const FusedBackward& args);
// By dtype, as each is compiled by itself.
void fused_forward_sm90_bfloat16(const FusedForward& args);
void fused_forward_sm90_float16(const FusedForward& args);
void fused_backward_sm90_bfloat16(const FusedBackward& args);
void fused_backward_sm90_float16(const FusedBackward& args);

// ---------------------------------------------------------------------------------------- planning
// Plain functions of numbers, tested without a device.

// Output tiles of the fused kernels. Both variants have the same two, so that a plan is the same for both.
enum class FusedTile { small, large };
constexpr int64_t kLargeTileRows = 128, kLargeTileColumns = 128;

// Below this a fused kernel has no more than one row of tiles, which leaves most of a GPU idle; torch's GEMM
// splits along K there.
constexpr int64_t kFewestFusedTokens = 64;

// The forward tile. A multiprocessor has a whole number of tiles, and the last ones keep all others waiting: so
// the tile is the one whose largest share of work is smaller. Half a tile counts for 11/20 of one, since it reads
// more for its products and has its epilogue as often as a whole one. (8192 x 768 x 3072: 12 large ones each, of
// 11.6. 1024: 2 of 1.45, which 3 small ones undercut by a sixth.)
inline FusedTile fused_forward_tile(int64_t tokens, int64_t inner, int multiprocessors) {
    const auto each = [&](int64_t tile_rows) {
        const int64_t rows = (tokens + tile_rows - 1) / tile_rows;
        const int64_t columns = (inner + kLargeTileColumns - 1) / kLargeTileColumns;
        return (rows * columns + multiprocessors - 1) / multiprocessors;
    };
    return 20 * each(kLargeTileRows) <= 11 * each(kLargeTileRows / 2) ? FusedTile::large : FusedTile::small;
}

// The shape of the partial column sums that a fused backward kernel, whose tile is the large one, writes: for
// each row of tiles one row (sm80) or one for each of the four warps that share a tile (sm90), of whole
// tiles.
constexpr int64_t kSm90PartialsOfTile = 4;
inline Partials fused_partials(GeluFfnVariant path, int64_t tokens, int64_t inner) {
    const int64_t rows = (tokens + kLargeTileRows - 1) / kLargeTileRows;
    const int64_t columns = (inner + kLargeTileColumns - 1) / kLargeTileColumns;
    return {nullptr, path == GeluFfnVariant::sm90 ? rows * kSm90PartialsOfTile : rows, inner,
            columns * kLargeTileColumns};
}

// How a call runs: the best of what is allowed and what the device, the dtype and the sizes allow.
// `depth` is what the product sums over: H forward, O backward. `aligned`: all addresses are multiples of 16
// bytes.
inline GeluFfnVariant gelu_ffn_path(GeluFfnVariant allowed, int arch, Dtype dtype, int64_t tokens,
                                    int64_t depth, int64_t inner, bool aligned) {
    // TMA and cp.async move 16 bytes: rows must be multiples of that. CUTLASS counts rows and columns in
    // int32.
    const bool fits = aligned && dtype != Dtype::float32 && depth > 0 && depth % 8 == 0 && inner % 8 == 0 &&
                      tokens >= kFewestFusedTokens && tokens <= INT32_MAX - kLargeTileRows &&
                      depth <= INT32_MAX && inner <= INT32_MAX - kLargeTileColumns;
    if (!fits || arch < 80) return GeluFfnVariant::portable;
    if (allowed == GeluFfnVariant::sm90 && arch == 90) return GeluFfnVariant::sm90;
    return allowed == GeluFfnVariant::portable ? GeluFfnVariant::portable : GeluFfnVariant::sm80;
}

}  // namespace rk::cuda
