// Registers the encoder on the parameters themselves.
#include "csrc/cpu/encoder_binding.h"

namespace rk::cpu {
namespace {

constexpr size_t kTensorsOfLayer = 16;

EncoderLayer<Weight> read_layer(const Checks& checks, LayerReader& reader, EncoderArgs<Weight>& args) {
    EncoderLayer<Weight> l{};
    const int64_t hidden = args.hidden;
    l.qkv[0] = reader.weight("the query's weight", -1, hidden);
    const int64_t inner = l.qkv[0].rows;
    take_head_dim(checks, args, reader.layer, inner);
    l.qkv_bias[0] = reader.vector("the query's bias", inner);
    l.qkv[1] = reader.weight("the key's weight", inner, hidden);
    l.qkv_bias[1] = reader.vector("the key's bias", inner);
    l.qkv[2] = reader.weight("the value's weight", inner, hidden);
    l.qkv_bias[2] = reader.vector("the value's bias", inner);
    l.attention_out = reader.weight("the weight of the attention's output", hidden, inner);
    l.attention_out_bias = reader.vector("the bias of the attention's output", hidden);
    l.attention_norm_weight = reader.vector("the weight of the attention's norm", hidden);
    l.attention_norm_bias = reader.vector("the bias of the attention's norm", hidden);
    l.in = reader.weight("the first weight of the feed-forward", -1, hidden);
    l.in_bias = reader.vector("the first bias of the feed-forward", l.in.rows);
    l.out = reader.weight("the second weight of the feed-forward", hidden, l.in.rows);
    l.out_bias = reader.vector("the second bias of the feed-forward", hidden);
    l.norm_weight = reader.vector("the weight of the norm", hidden);
    l.norm_bias = reader.vector("the bias of the norm", hidden);
    return l;
}

Tensor encode(const Tensor& x, std::vector<Tensor> layers, const Tensor& cu_seqlens, int64_t max_seqlen,
              std::optional<Tensor> key_mask, bool causal, int64_t heads, double scale, double eps, bool tanh,
              std::optional<Tensor> bias) {
    const Checks checks("encoder", x, "x");
    return call_encoder<Weight>(checks, x, layers, kTensorsOfLayer,
                                {cu_seqlens, max_seqlen, key_mask, causal, heads, scale, eps, tanh, bias},
                                read_layer,
                                [](const EncoderInPlaceArgs& args) { RK_DISPATCH(encoder, args); });
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("encoder", TORCH_BOX(&rk::cpu::encode));
}
