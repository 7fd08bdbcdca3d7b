// What the bindings of encoder and packed_encoder share: the checks of everything but the weights, and the
// call. For *_binding.cpp only.
#pragma once
#include <string>
#include <vector>

#include "csrc/cpu/encoder.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {

// What a call is given beside x and the layers.
struct EncoderOptions {
    const Tensor& cu_seqlens;  // [B + 1]
    int64_t max_seqlen;
    const std::optional<Tensor>& key_mask;  // [T]
    bool causal;
    int64_t heads;
    double scale, eps;
    bool tanh;
    const std::optional<Tensor>& bias;  // [heads, max_seqlen or more, max_seqlen or more]
};

// Reads the tensors of `layers` one by one, naming each. Tensors that it had to copy stay alive with it.
class LayerReader {
  public:
    LayerReader(const Checks& checks, std::vector<Tensor>& layers) : checks_(checks), layers_(layers) {}

    const Tensor& next() { return layers_[at_++]; }

    const void* vector(const char* name, int64_t size) {
        Tensor& t = layers_[at_++];
        checks_.vector(t, label(name).c_str(), size);
        if (!t.is_contiguous()) t = as_contiguous(t);
        return t.const_data_ptr();
    }

    // [rows, columns], of any number of rows where `rows` is -1.
    Weight weight(const char* name, int64_t rows, int64_t columns) {
        const Tensor& t = layers_[at_++];
        const std::string what = label(name);
        checks_.same(t, what.c_str(), checks_.scalar_type());
        const char* op = checks_.op();
        STD_TORCH_CHECK(
            t.dim() == 2 && t.size(1) == columns && (rows < 0 || t.size(0) == rows) && t.numel() > 0, op,
            ": ", what, " must have shape [", rows < 0 ? "any" : std::to_string(rows), ", ", columns,
            "], got ", shape(t));
        STD_TORCH_CHECK((t.size(1) == 1 || t.stride(1) == 1) && (t.size(0) == 1 || t.stride(0) >= t.size(1)),
                        op, ": ", what, " must have contiguous rows, got strides [", t.stride(0), ", ",
                        t.stride(1), "]");
        return {t.const_data_ptr(), t.size(0), t.size(1), t.size(0) == 1 ? t.size(1) : t.stride(0)};
    }

    static std::string shape(const Tensor& t) {
        std::string sizes = "[";
        for (int64_t i = 0; i < t.dim(); ++i) sizes += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
        return sizes + "]";
    }

    // "the query's weight of layer 3"
    std::string label(const char* name) const {
        return std::string(name) + " of layer " + std::to_string(layer);
    }

    size_t layer = 0;

  private:
    const Checks& checks_;
    std::vector<Tensor>& layers_;
    size_t at_ = 0;
};

// The heads' size from the rows of the query's weight, the same in every layer.
template <class W>
inline void take_head_dim(const Checks& checks, EncoderArgs<W>& args, size_t layer, int64_t inner) {
    checks.require(inner % args.heads == 0, "query, key and value do not divide into the heads");
    checks.require(layer == 0 || inner == args.heads * args.head_dim,
                   "layers differ in the size of their heads");
    args.head_dim = inner / args.heads;
}

// Checks everything, allocates the output and calls run(args). read_layer(checks, reader, args) reads one
// layer of `tensors_of_layer` tensors and fills in args.head_dim.
template <class W, class ReadLayer, class Run>
inline Tensor call_encoder(const Checks& checks, const Tensor& x_, std::vector<Tensor>& tensors,
                           size_t tensors_of_layer, const EncoderOptions& options,
                           const ReadLayer& read_layer, const Run& run) {
    checks.require(x_.dim() == 2, "x must have shape [T, H]");
    checks.require(options.heads > 0, "heads must be positive");
    STD_TORCH_CHECK(tensors.size() % tensors_of_layer == 0, checks.op(), ": layers must hold ",
                    tensors_of_layer, " tensors for each layer, got ", tensors.size());
    const Tensor x = as_contiguous(x_);
    EncoderArgs<W> args{};
    args.tokens = x.size(0), args.hidden = x.size(1), args.heads = options.heads;
    args.causal = options.causal, args.tanh = options.tanh, args.bf16 = checks.bf16();
    args.scale = static_cast<float>(options.scale), args.eps = static_cast<float>(options.eps);
    std::vector<EncoderLayer<W>> layers(tensors.size() / tensors_of_layer);
    LayerReader reader(checks, tensors);
    for (; reader.layer < layers.size(); ++reader.layer)
        layers[reader.layer] = read_layer(checks, reader, args);
    args.layers = layers.data(), args.layer_count = static_cast<int64_t>(layers.size());
    checks.require(layers.empty() || (args.head_dim >= 16 && args.head_dim <= 128 && args.head_dim % 8 == 0),
                   "head_dim must be a multiple of 8 from 16 to 128");
    const Tensor cu_seqlens = check_cu_seqlens(checks, options.cu_seqlens, "cu_seqlens", args.tokens,
                                               options.max_seqlen, "max_seqlen");
    args.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    args.batch = cu_seqlens.size(0) - 1;
    Tensor key_mask;
    if (options.key_mask) {
        checks.vector(*options.key_mask, "key_mask", args.tokens, ScalarType::Bool);
        key_mask = as_contiguous(*options.key_mask);
        args.key_mask = static_cast<const bool*>(key_mask.const_data_ptr());
    }
    const std::optional<Tensor> bias =
        check_bias(checks, options.bias, args.heads, options.max_seqlen, options.max_seqlen);
    if (bias)
        args.bias = bias->const_data_ptr(), args.bias_rows = bias->size(1), args.bias_columns = bias->size(2);
    Tensor out = checks.empty({args.tokens, args.hidden});
    args.x = x.const_data_ptr();
    args.out = out.mutable_data_ptr();
    run(args);
    return out;
}

}  // namespace rk::cpu
