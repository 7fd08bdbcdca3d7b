// The products on tiles with C entry points, for test_amx.py: compiled with RK_AMX_TWIN for any x86-64 machine, and
// without it for one that has AMX. Threads are the library's own.
#include "csrc/cpu/gelu_ffn.cpp"
#include "csrc/cpu/packed_weight.h"
#include "csrc/cpu/tile_layers.h"

using namespace rk::cpu::amx;

namespace {

template <class F>
void on(bool is_bf16, int parts, const F& f) {
    if (is_bf16) return f(Parts<1>{}, bf16{});
    if (parts == 1) return f(Parts<1>{}, float{});
    if (parts == 2) return f(Parts<2>{}, float{});
    f(Parts<3>{}, float{});
}

}  // namespace

extern "C" {

// c += a b; 1024 bytes each
void tile_dot(bool whole_numbers, const void* a, const void* b, void* c) {
    const TileUse use;
    tile_load<0>(c), tile_load<1>(a), tile_load_once<2>(b);
    whole_numbers ? tile_dot_u8s8<0, 1, 2>() : tile_dot_bf16<0, 1, 2>();
    tile_store<0>(c);
}

#if !defined(RK_AMX_TWIN)
// The thread's tile configuration after a use of tiles, where `before` (64 bytes, or null for none) was in force.
void configuration_after_use(const void* before, void* after) {
    if (before != nullptr) asm volatile("ldtilecfg (%0)" : : "r"(before) : "memory");
    {
        const TileUse use;
    }
    asm volatile("sttilecfg (%0)" : : "r"(after) : "memory");
    asm volatile("tilerelease");
}
#endif

// out = x (w_0 | w_1 | w_2)^T + biases. sizes: tokens, K, rows of each; row_stride: of the weights
void tile_project(bool is_bf16, int parts, int count, const int64_t* sizes, int64_t row_stride,
                  const void* const* w, const void* const* biases, const void* x, void* out) {
    on(is_bf16, parts, [&](auto kept, auto element) {
        using T = decltype(element);
        rk::cpu::Weight weights[3];
        const T* bias[3];
        for (int i = 0; i < count; ++i) {
            weights[i] = {w[i], sizes[2 + i], sizes[1], row_stride};
            bias[i] = static_cast<const T*>(biases[i]);
        }
        project_rows<kept()>(weights, bias, count, static_cast<const T*>(x), sizes[0], static_cast<T*>(out));
    });
}

// out = x w^T, of both rounded to integers. sizes: rows, K, N
void tile_whole(const int64_t* sizes, const float* x, const float* w, float* out) {
    using namespace rk::cpu;
    int64_t bytes = 0;
    PackWeightArgs packing{w, sizes[2], sizes[1], WeightKind::int8_dynamic, nullptr, &bytes};
    bytes = bytes_of_weight(packing.kind, packing.rows, packing.columns);
    packing.panels = static_cast<char*>(aligned_alloc(64, size_t(ceil_div(bytes, 64) * 64)));
    pack_panels(packing);
    const LeftOperand left = pack_left(packing.kind, x, sizes[0], sizes[1], sizes[1]);
    multiply_weight({packing.panels, packing.rows, packing.columns, packing.kind}, left,
                    StoreTile<float>{out, sizes[2], nullptr});
    free(packing.panels);
}

// sizes: tokens, H, F, O
void tile_feed_forward(bool is_bf16, int parts, bool tanh, const int64_t* sizes, const void* x,
                       const void* w_in, const void* b_in, const void* w_out, const void* b_out, void* out,
                       void* preactivation) {
    on(is_bf16, parts, [&](auto kept, auto element) {
        using T = decltype(element);
        FeedForward<T> f{};
        f.in = {w_in, sizes[2], sizes[1], sizes[1]}, f.out = {w_out, sizes[3], sizes[2], sizes[2]};
        f.in_bias = static_cast<const T*>(b_in), f.out_bias = static_cast<const T*>(b_out);
        f.x = static_cast<const T*>(x), f.result = static_cast<T*>(out);
        f.preactivation = static_cast<T*>(preactivation), f.tokens = sizes[0];
        tanh ? feed_forward<kept(), true>(f) : feed_forward<kept(), false>(f);
    });
}

// sizes: tokens, H, F, O; tensors: as in GeluFfnBackwardArgs, from grad_out on
void tile_backward(bool is_bf16, bool tanh, const int64_t* sizes, void* const* tensors) {
    rk::cpu::GeluFfnBackwardArgs b{};
    b.tokens = sizes[0], b.hidden = sizes[1], b.inner = sizes[2], b.outer = sizes[3];
    b.bf16 = is_bf16, b.tanh = tanh;
    b.grad_out = tensors[0], b.x = tensors[1], b.w_in = tensors[2], b.w_out = tensors[3];
    b.preactivation = tensors[4], b.activation = tensors[5], b.grad_preactivation = tensors[6];
    b.grad_x = tensors[7], b.grad_w_in = tensors[8], b.grad_b_in = tensors[9];
    b.grad_w_out = tensors[10], b.grad_b_out = tensors[11];
    gelu_ffn_backward(b);
}

}  // extern "C"
