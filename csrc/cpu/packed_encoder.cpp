// All layers of an encoder in one call, on weights that were packed beforehand.
#include "csrc/cpu/packed_encoder.h"

#include "csrc/cpu/encoder_layers.h"
#include "csrc/cpu/packed_weight.h"

namespace rk::cpu::RK_CPU_ISA {
namespace {

static_assert(kRows <= kLanes, "the activation's block below");
#if defined(RK_CPU_ISA_AMX)
static_assert(kTileSide <= kLanes, "the activation's block below");
#endif

constexpr int64_t kStepRows = kRows * (1024 / kRows);  // rows of one product

// f(first, count) for steps of rows, as equal as can be.
template <class F>
void for_steps(int64_t rows, const F& f) {
    const int64_t steps = ceil_div(rows, kStepRows);
    for (int64_t i = 0; i < steps; ++i) f(rows * i / steps, rows * (i + 1) / steps - rows * i / steps);
}

// out = x W^T, and where there is one, a bias.
void multiply_rows(const PackedWeight& w, const float* x, int64_t rows, const float* bias, float* out) {
    for_steps(rows, [&](int64_t first, int64_t count) {
        const LeftOperand left = pack_left(w.kind, x + first * w.columns, count, w.columns, w.columns);
        multiply_weight(w, left, StoreTile<float>{out + first * w.rows, w.rows, bias});
    });
}

// The products of encoder_layers.h.
struct PackedProducts {
    using Element = float;
    using Weight = PackedWeight;

    void qkv(const EncoderLayer<Weight>& l, const float* x, int64_t rows, float* out) const {
        const Weight& w = l.qkv[0];  // all three
        float* const bias = thread_scratch(Use::activation).words(w.rows);
        for (int i = 0; i < 3; ++i)
            __builtin_memcpy(bias + i * (w.rows / 3), l.qkv_bias[i], size_t(w.rows / 3) * 4);
        multiply_rows(w, x, rows, bias, out);
    }
    void attention_out(const EncoderLayer<Weight>& l, const float* context, int64_t rows, float* out) const {
        multiply_rows(l.attention_out, context, rows, nullptr, out);
    }
    template <bool kTanh>
    void feed_forward(const EncoderLayer<Weight>& l, const float* x, int64_t rows, float* out) const {
        const int64_t hidden = l.in.columns, inner = l.in.rows;
        const float* const in_bias = static_cast<const float*>(l.in_bias);
        float* const activations = thread_scratch(Use::activation).words(min64(rows, kStepRows) * inner);
        for_steps(rows, [&](int64_t first, int64_t count) {
            const LeftOperand left = pack_left(l.in.kind, x + first * hidden, count, hidden, hidden);
            const RowPanels panels(count, inner);
            const bool rounds =
                l.out.kind == WeightKind::int8_dynamic;  // a row is rounded when it is complete
            const StoreTile<float> store_activation{activations, inner, nullptr};
            multiply_weight(
                l.in, left, [&](int64_t row, int64_t column, int height, int width, const float* tile) {
                    alignas(64) float activation[kLanes * kColumns];  // pack_along_k knows of kLanes rows
                    for (int j = 0; j < width; j += kLanes) {
                        const vf32 bias = load_some(in_bias + column + j, width - j);
                        for (int i = 0; i < height; ++i)
                            store(activation + i * kColumns + j,
                                  gelu<kTanh>(load(tile + i * kColumns + j) + bias));
                    }
                    if (rounds)
                        store_activation(row, column, height, width, activation);
                    else
                        pack_along_k(activation, kColumns, height, width,
                                     activations + panels.offset(panels.index(row)) + column * height, height,
                                     height);
                });
            const LeftOperand activated = rounds ? pack_left(l.out.kind, activations, count, inner, inner)
                                                 : LeftOperand{panels, activations, nullptr, nullptr, count};
            multiply_weight(l.out, activated, StoreTile<float>{out + first * hidden, hidden, nullptr});
        });
    }
};

}  // namespace

void pack_weight(const PackWeightArgs& a) {
    *a.bytes = bytes_of_weight(a.kind, a.rows, a.columns);
    if (a.panels != nullptr) pack_panels(a);
}

void packed_encoder(const PackedEncoderArgs& a) {
    run_encoder(a, PackedProducts{});
}

}  // namespace rk::cpu::RK_CPU_ISA
