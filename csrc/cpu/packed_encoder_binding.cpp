// Registers the inference path for CPU tensors on copies of weights: packing a weight, and running an encoder.
#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

#include "csrc/cpu/encoder_binding.h"
#include "csrc/cpu/packed_encoder.h"

namespace rk::cpu {
namespace {

constexpr size_t kTensorsOfLayer = 14;

WeightKind kind_of(const std::string& name) {
    for (int kind = 0; kind < kWeightKindCount; ++kind)
        if (name == kWeightKinds[kind]) return static_cast<WeightKind>(kind);
    STD_TORCH_CHECK(false, "pack_weight: kind must be float32, bfloat16, int8 or int8-dynamic, got ", name);
    return WeightKind::float32;
}

// The panels of a large weight start at a huge page, which the kernel is asked for: a weight is read from end
// to end, and with 4 KB pages the look-up of addresses costs as much as the bytes of few rows.
constexpr int64_t kHugePage = 2 << 20;

int64_t panels_at(const char* base, int64_t bytes) {
    int64_t at = (sizeof(PackedHeader) + 63) / 64 * 64;
    at += (64 - reinterpret_cast<uintptr_t>(base + at) % 64) % 64;
    if (bytes < kHugePage) return at;
    const auto address = reinterpret_cast<uintptr_t>(base + at);
    return at + static_cast<int64_t>((kHugePage - address % kHugePage) % kHugePage);
}

Tensor pack(const Tensor& weight_, const std::string& name) {
    const char* op = "pack_weight";
    const Checks checks(op, weight_, "weight");
    checks.same(weight_, "weight", ScalarType::Float);
    checks.require(weight_.dim() == 2, "weight must have shape [N, K]");
    const Tensor weight = as_contiguous(weight_);
    int64_t bytes = 0;
    PackWeightArgs args{static_cast<const float*>(weight.const_data_ptr()),
                        weight.size(0),
                        weight.size(1),
                        kind_of(name),
                        nullptr,
                        &bytes};
    RK_DISPATCH(pack_weight, args);
    const int64_t slack = 256 + (bytes < kHugePage ? 0 : kHugePage);  // never touched, so never in memory
    Tensor packed = checks.empty({bytes + slack}, ScalarType::Byte);
    char* const base = static_cast<char*>(packed.mutable_data_ptr());
    PackedHeader header{
        kPackedMagic, static_cast<int32_t>(args.kind), static_cast<int32_t>(active_isa()), args.rows,
        args.columns, panels_at(base, bytes)};
    std::memcpy(base, &header, sizeof header);
    args.panels = base + header.panels_at;
    if (bytes >= kHugePage)
        madvise(args.panels, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);  // advice
    RK_DISPATCH(pack_weight, args);
    return packed;
}

PackedWeight unpack(LayerReader& reader, const char* name, int64_t rows, int64_t columns) {
    const char* op = "packed_encoder";
    const Tensor& t = reader.next();
    const std::string what = reader.label(name);
    PackedHeader header{};
    const bool sized = t.scalar_type() == ScalarType::Byte && t.dim() == 1 && t.is_contiguous() &&
                       t.numel() >= static_cast<int64_t>(sizeof header);
    if (sized) std::memcpy(&header, t.const_data_ptr(), sizeof header);
    STD_TORCH_CHECK(sized && header.magic == kPackedMagic, op, ": ", what, " is not what pack_weight gave");
    STD_TORCH_CHECK(header.isa == static_cast<int>(active_isa()), op, ": ", what,
                    " was packed for another instruction set, ", kIsaNames[header.isa]);
    STD_TORCH_CHECK(header.columns == columns && (rows < 0 || header.rows == rows), op, ": ", what,
                    " is a weight of shape [", header.rows, ", ", header.columns,
                    "], which does not fit here");
    return {static_cast<const char*>(t.const_data_ptr()) + header.panels_at, header.rows, header.columns,
            static_cast<WeightKind>(header.kind)};
}

EncoderLayer<PackedWeight> read_layer(const Checks& checks, LayerReader& reader, PackedEncoderArgs& args) {
    EncoderLayer<PackedWeight> l{};
    const int64_t hidden = args.hidden;
    l.qkv[0] = unpack(reader, "the weight of query, key and value", -1, hidden);
    const int64_t inner = l.qkv[0].rows / 3;
    checks.require(inner * 3 == l.qkv[0].rows, "query, key and value do not divide into the heads");
    take_head_dim(checks, args, reader.layer, inner);
    l.qkv_bias[0] = reader.vector("the query's bias", inner);
    l.qkv_bias[1] = reader.vector("the key's bias", inner);
    l.qkv_bias[2] = reader.vector("the value's bias", inner);
    l.attention_out = unpack(reader, "the weight of the attention's output", hidden, inner);
    l.attention_out_bias = reader.vector("the bias of the attention's output", hidden);
    l.attention_norm_weight = reader.vector("the weight of the attention's norm", hidden);
    l.attention_norm_bias = reader.vector("the bias of the attention's norm", hidden);
    l.in = unpack(reader, "the first weight of the feed-forward", -1, hidden);
    l.in_bias = reader.vector("the first bias of the feed-forward", l.in.rows);
    l.out = unpack(reader, "the second weight of the feed-forward", hidden, l.in.rows);
    l.out_bias = reader.vector("the second bias of the feed-forward", hidden);
    l.norm_weight = reader.vector("the weight of the norm", hidden);
    l.norm_bias = reader.vector("the bias of the norm", hidden);
    return l;
}

Tensor encode(const Tensor& x, std::vector<Tensor> layers, const Tensor& cu_seqlens, int64_t max_seqlen,
              std::optional<Tensor> key_mask, bool causal, int64_t heads, double scale, double eps, bool tanh,
              std::optional<Tensor> bias) {
    const Checks checks("packed_encoder", x, "x");
    checks.same(x, "x", ScalarType::Float);
    return call_encoder<PackedWeight>(
        checks, x, layers, kTensorsOfLayer,
        {cu_seqlens, max_seqlen, key_mask, causal, heads, scale, eps, tanh, bias}, read_layer,
        [](const PackedEncoderArgs& args) { RK_DISPATCH(packed_encoder, args); });
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("pack_weight", TORCH_BOX(&rk::cpu::pack));
    m.impl("packed_encoder", TORCH_BOX(&rk::cpu::encode));
}
