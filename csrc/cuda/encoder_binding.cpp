// Registers the encoder: all layers in one call, on the parameters themselves, without gradients.
//
// A layer is what the single ops would run, kernel by kernel, in their order: three products into one buffer,
// attention, a product, add_layer_norm, the feed-forward's product with GELU, a product, add_layer_norm. What lies
// between the steps is allocated once for all layers: kernels of a stream run one after another.
#include <device.h>

#include <array>
#include <string>
#include <vector>

#include "csrc/cuda/add_layer_norm.h"
#include "csrc/cuda/serving.h"

namespace rk::cuda {
namespace {

// The tensors of a layer, in the order of roberta_kernels/encoder_call.py.
enum Part {
    kQueryWeight,
    kQueryBias,
    kKeyWeight,
    kKeyBias,
    kValueWeight,
    kValueBias,
    kAttentionWeight,
    kAttentionBias,
    kAttentionNormWeight,
    kAttentionNormBias,
    kInnerWeight,
    kInnerBias,
    kOutputWeight,
    kOutputBias,
    kOutputNormWeight,
    kOutputNormBias,
    kTensorsOfLayer
};
constexpr const char* kNames[kTensorsOfLayer] = {
    "the query's weight",
    "the query's bias",
    "the key's weight",
    "the key's bias",
    "the value's weight",
    "the value's bias",
    "the weight of the attention's output",
    "the bias of the attention's output",
    "the weight of the attention's norm",
    "the bias of the attention's norm",
    "the first weight of the feed-forward",
    "the first bias of the feed-forward",
    "the second weight of the feed-forward",
    "the second bias of the feed-forward",
    "the weight of the norm",
    "the bias of the norm",
};

struct Sizes {
    int64_t hidden, inner, wide;  // of the hidden states, of all heads together, of the feed-forward
};

// Rows and columns of a part; columns 0: a vector.
std::array<int64_t, 2> shape_of(int part, const Sizes& s) {
    switch (part) {
        case kQueryWeight:
        case kKeyWeight:
        case kValueWeight:
            return {s.inner, s.hidden};
        case kQueryBias:
        case kKeyBias:
        case kValueBias:
            return {s.inner, 0};
        case kAttentionWeight:
            return {s.hidden, s.inner};
        case kInnerWeight:
            return {s.wide, s.hidden};
        case kInnerBias:
            return {s.wide, 0};
        case kOutputWeight:
            return {s.hidden, s.wide};
        default:
            return {s.hidden, 0};
    }
}

// Every shape, dtype, device and layout; norms that do not lie on 16 bytes are copied. A name is made where
// something is wrong alone: there are hundreds of tensors, and this runs in every call.
void check_layer(const Checks& checks, Tensor* parts, const Sizes& sizes, size_t layer) {
    for (int i = 0; i < kTensorsOfLayer; ++i) {
        const Tensor& t = parts[i];
        const auto [rows, columns] = shape_of(i, sizes);
        const auto found = t.sizes();
        const bool fits = columns == 0 ? found.size() == 1 && found[0] == rows
                                       : found.size() == 2 && found[0] == rows && found[1] == columns;
        if (fits && checks.is_same(t) && t.is_contiguous()) continue;
        const std::string name = std::string(kNames[i]) + " of layer " + std::to_string(layer);
        checks.same(t, name.c_str(), checks.scalar_type());
        STD_TORCH_CHECK(fits, checks.op(), ": ", name, " must have shape [", rows,
                        columns == 0 ? "]" : ", " + std::to_string(columns) + "]");
        STD_TORCH_CHECK(false, checks.op(), ": ", name, " must be contiguous");
    }
    for (const int i : {kAttentionBias, kAttentionNormWeight, kAttentionNormBias, kOutputBias,
                        kOutputNormWeight, kOutputNormBias})
        if (!is_aligned(parts[i])) parts[i] = torch::stable::clone(parts[i]);
}

// What lies between the steps of a layer, for rows [T, ...].
struct Buffers {
    Buffers(const Checks& checks, int64_t tokens, int64_t heads, const Sizes& s)
        : qkv(checks.empty({3, tokens, s.inner})),
          q(matrix_in(qkv, tokens, s.inner)),
          k(matrix_in(qkv, tokens, s.inner, tokens * s.inner)),
          v(matrix_in(qkv, tokens, s.inner, 2 * tokens * s.inner)),
          context(checks.empty({tokens, s.inner})),
          lse(checks.empty({heads, tokens}, ScalarType::Float)),
          product(checks.empty({tokens, s.hidden})),
          attended(checks.empty({tokens, s.hidden})),
          statistics(checks.empty({2, tokens}, ScalarType::Float)) {}

    Tensor qkv, q, k, v, context, lse, product, attended, statistics;
};

class Encoder {
  public:
    Encoder(const Checks& checks, AttentionArgs attention, const Sizes& sizes, double eps, bool tanh)
        : checks_(checks),
          attention_(attention),
          tanh_(tanh),
          buffers_(checks, attention.total_q, attention.heads, sizes) {
        const auto heads = [&](const Tensor& t) {
            return HeadsView{t.const_data_ptr(), sizes.inner, attention.head_dim};
        };
        attention_.q = heads(buffers_.q);
        attention_.k = heads(buffers_.k);
        attention_.v = heads(buffers_.v);
        attention_.out = buffers_.context.mutable_data_ptr();
        attention_.lse = static_cast<float*>(buffers_.lse.mutable_data_ptr());
        norm_.rows = attention.total_q;
        norm_.hidden = sizes.hidden;
        norm_.eps = static_cast<float>(eps);
        norm_.dtype = attention.dtype;
        norm_.stream = attention.stream;
        norm_.mean = static_cast<float*>(buffers_.statistics.mutable_data_ptr());
        norm_.rstd = norm_.mean + attention.total_q;
    }

    // out may be x.
    void layer(const Tensor& x, const Tensor* parts, Tensor& out) {
        Buffers& b = buffers_;
        multiply_add(b.q, parts[kQueryBias], x, transposed(parts[kQueryWeight]));
        multiply_add(b.k, parts[kKeyBias], x, transposed(parts[kKeyWeight]));
        multiply_add(b.v, parts[kValueBias], x, transposed(parts[kValueWeight]));
        serve_attention_forward(attention_);
        multiply(b.product, b.context, transposed(parts[kAttentionWeight]));
        add_norm(x, parts + kAttentionBias, b.attended);
        const int64_t wide = parts[kInnerWeight].size(0);
        if (!activation_ || activation_->size(1) != wide)
            activation_ = checks_.empty({attention_.total_q, wide});
        serve_gelu_product(checks_, b.attended, parts[kInnerWeight], parts[kInnerBias], tanh_,
                           attention_.stream, *activation_, nullptr);
        multiply(b.product, *activation_, transposed(parts[kOutputWeight]));
        add_norm(b.attended, parts + kOutputBias, out);
    }

  private:
    // out = layer_norm(residual + product + bias). parts: that bias, then the norm's weight and bias.
    void add_norm(const Tensor& residual, const Tensor* parts, Tensor& out) {
        norm_.x = buffers_.product.const_data_ptr();
        norm_.residual = residual.const_data_ptr();
        norm_.x_bias = parts[0].const_data_ptr();
        norm_.weight = parts[1].const_data_ptr();
        norm_.bias = parts[2].const_data_ptr();
        norm_.out = out.mutable_data_ptr();
        add_layer_norm_forward(norm_);
    }

    const Checks& checks_;
    AttentionArgs attention_;
    AddLayerNormArgs norm_{};
    bool tanh_;
    Buffers buffers_;
    std::optional<Tensor> activation_;  // layers may differ in its width
};

static_assert(kAttentionNormWeight == kAttentionBias + 1 && kAttentionNormBias == kAttentionBias + 2);
static_assert(kOutputNormWeight == kOutputBias + 1 && kOutputNormBias == kOutputBias + 2);

Tensor encode(const Tensor& x_, std::vector<Tensor> layers, const Tensor& cu_seqlens_, int64_t max_seqlen,
              const std::optional<Tensor>& key_mask_, bool causal, int64_t heads, double scale, double eps,
              bool tanh, const std::optional<Tensor>& bias) {
    const Checks checks("encoder", x_, "x");
    checks.require(x_.dim() == 2, "x must have shape [T, H]");
    checks.require(heads > 0, "heads must be positive");
    checks.require(!bias.has_value(), "the CUDA kernels take no bias");
    checks.require(max_seqlen >= 0, "max_seqlen must not be negative");
    STD_TORCH_CHECK(layers.size() % kTensorsOfLayer == 0, checks.op(), ": layers must hold ",
                    static_cast<int64_t>(kTensorsOfLayer), " tensors for each layer, got ", layers.size());
    const int64_t tokens = x_.size(0), hidden = x_.size(1),
                  batch = check_cu_seqlens(checks, cu_seqlens_, "cu_seqlens");
    checks.require(batch > 0 || tokens == 0, "there are tokens, and no sequences");
    const OnDeviceOf device(x_);
    Sizes sizes{hidden, 0, 0};
    for (size_t first = 0; first < layers.size(); first += kTensorsOfLayer) {
        const size_t layer = first / kTensorsOfLayer;
        const Tensor &query = layers[first], &wide = layers[first + kInnerWeight];
        checks.require(query.dim() == 2 && wide.dim() == 2, "weights must have shape [N, K]");
        checks.require(layer == 0 || query.size(0) == sizes.inner,
                       "layers differ in the size of their heads");
        sizes = {hidden, query.size(0), wide.size(0)};
        checks.require(sizes.inner % heads == 0, "query, key and value do not divide into the heads");
        check_layer(checks, &layers[first], sizes, layer);
    }
    const int64_t head_dim = sizes.inner / heads;
    checks.require(layers.empty() || (head_dim >= 16 && head_dim <= 128 && head_dim % 8 == 0),
                   "head_dim must be a multiple of 8 from 16 to 128");
    AttentionArgs attention{};
    const Tensor cu_seqlens = as_contiguous(cu_seqlens_);
    attention.cu_seqlens_q = attention.cu_seqlens_k =
        static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    std::optional<Tensor> key_mask;
    if (key_mask_.has_value()) {
        checks.vector(*key_mask_, "key_mask", tokens, ScalarType::Bool);
        key_mask = as_contiguous(*key_mask_);
        attention.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
    }
    const Tensor x = as_aligned(x_);
    if (layers.empty() || tokens == 0) return torch::stable::clone(x);
    attention.batch = batch, attention.heads = heads, attention.head_dim = head_dim;
    attention.total_q = attention.total_k = tokens;
    // No sequence is longer than all tokens together: launches are planned from what can be.
    attention.max_seqlen_q = attention.max_seqlen_k = max_seqlen < tokens ? max_seqlen : tokens;
    attention.scale = static_cast<float>(scale), attention.causal = causal, attention.dtype = checks.dtype();
    attention.stream = device.stream();
    Encoder encoder(checks, attention, sizes, eps, tanh);
    Tensor out = checks.empty({tokens, hidden});
    for (size_t first = 0; first < layers.size(); first += kTensorsOfLayer)
        encoder.layer(first == 0 ? x : out, &layers[first], out);
    return out;
}

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cuda, RK_DISPATCH_KEY, m) {
    m.impl("encoder", TORCH_BOX(&rk::cuda::encode));
}
