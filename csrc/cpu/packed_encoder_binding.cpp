// Registers the inference path for CPU tensors: packing a weight, running an encoder, and a look at whether
// weights are still those that were packed.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "csrc/cpu/packed_encoder.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

constexpr int kTensorsOfLayer = 14;

WeightKind kind_of(const std::string& name) {
    for (int kind = 0; kind < kWeightKindCount; ++kind)
        if (name == kWeightKinds[kind]) return static_cast<WeightKind>(kind);
    STD_TORCH_CHECK(false, "pack_weight: kind must be float32, bfloat16, int8 or int8-dynamic, not ", name);
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
    PackWeight args{static_cast<const float*>(weight.const_data_ptr()),
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
        madvise(args.panels, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);  // a wish
    RK_DISPATCH(pack_weight, args);
    return packed;
}

PackedWeight unpack(const Tensor& t, const char* what, int64_t rows, int64_t columns) {
    const char* op = "packed_encoder";
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

Tensor encode(const Tensor& x_, std::vector<Tensor> layers, const Tensor& cu_seqlens_, int64_t max_seqlen,
              const std::optional<Tensor>& key_mask_, bool causal, int64_t heads, double scale, double eps,
              bool tanh) {
    const char* op = "packed_encoder";
    const Checks checks(op, x_, "x");
    checks.same(x_, "x", ScalarType::Float);
    checks.require(x_.dim() == 2, "x must have shape [T, H]");
    checks.require(heads > 0, "heads must be positive");
    checks.require(layers.size() % kTensorsOfLayer == 0, "layers must hold 14 tensors for each layer");
    const Tensor x = as_contiguous(x_);
    PackedEncoder e{};
    e.tokens = x.size(0), e.hidden = x.size(1), e.heads = heads;
    e.causal = causal, e.tanh = tanh, e.scale = static_cast<float>(scale), e.eps = static_cast<float>(eps);
    e.layer_count = static_cast<int64_t>(layers.size() / kTensorsOfLayer);

    std::vector<PackedLayer> packed(static_cast<size_t>(e.layer_count));
    const auto vector = [&](Tensor& t, const char* name, int64_t size) {
        checks.vector(t, name, size, ScalarType::Float);
        if (!t.is_contiguous()) t = as_contiguous(t);  // kept alive by `layers`
        return static_cast<const float*>(t.const_data_ptr());
    };
    for (size_t i = 0; i < packed.size(); ++i) {
        Tensor* t = layers.data() + i * kTensorsOfLayer;
        PackedLayer& l = packed[i];
        l.qkv = unpack(t[0], "the weight of query, key and value", -1, e.hidden);
        const int64_t inner = l.qkv.rows / 3;
        checks.require(inner % heads == 0 && inner * 3 == l.qkv.rows,
                       "query, key and value do not divide into the heads");
        checks.require(i == 0 || inner == e.heads * e.head_dim, "layers differ in the size of their heads");
        e.head_dim = inner / heads;
        l.q_bias = vector(t[1], "the query's bias", inner);
        l.k_bias = vector(t[2], "the key's bias", inner);
        l.v_bias = vector(t[3], "the value's bias", inner);
        l.attention_out = unpack(t[4], "the weight of the attention's output", e.hidden, inner);
        l.attention_out_bias = vector(t[5], "the bias of the attention's output", e.hidden);
        l.attention_norm_weight = vector(t[6], "the weight of the attention's norm", e.hidden);
        l.attention_norm_bias = vector(t[7], "the bias of the attention's norm", e.hidden);
        l.in = unpack(t[8], "the first weight of the feed-forward", -1, e.hidden);
        l.in_bias = vector(t[9], "the first bias of the feed-forward", l.in.rows);
        l.out = unpack(t[10], "the second weight of the feed-forward", e.hidden, l.in.rows);
        l.out_bias = vector(t[11], "the second bias of the feed-forward", e.hidden);
        l.norm_weight = vector(t[12], "the weight of the norm", e.hidden);
        l.norm_bias = vector(t[13], "the bias of the norm", e.hidden);
    }
    checks.require(e.layer_count == 0 || (e.head_dim >= 16 && e.head_dim <= 128 && e.head_dim % 8 == 0),
                   "head_dim must be a multiple of 8 from 16 to 128");
    e.layers = packed.data();

    const Tensor cu_seqlens =
        check_cu_seqlens(checks, cu_seqlens_, "cu_seqlens", e.tokens, max_seqlen, "max_seqlen");
    e.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    e.batch = cu_seqlens.size(0) - 1;
    Tensor key_mask;
    if (key_mask_) {
        checks.vector(*key_mask_, "key_mask", e.tokens, ScalarType::Bool);
        key_mask = as_contiguous(*key_mask_);
        e.key_mask = static_cast<const bool*>(key_mask.const_data_ptr());
    }
    Tensor out = checks.empty({e.tokens, e.hidden});
    e.x = static_cast<const float*>(x.const_data_ptr());
    e.out = static_cast<float*>(out.mutable_data_ptr());
    RK_DISPATCH(packed_encoder, e);
    return out;
}

// A hash of 32 elements of each weight, spread over it.
int64_t sample(std::vector<Tensor> weights) {
    constexpr int64_t kSamples = 32;
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const Tensor& t : weights) {
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.device().is_cpu(),
                        "sample_weights: weights must be contiguous float32 tensors on the CPU");
        const auto* data = static_cast<const uint32_t*>(t.const_data_ptr());
        const int64_t size = t.numel();
        uint32_t found[kSamples] = {};
        // 2654435761 / 2^32 is the golden ratio: the elements lie in no row or column.
        for (int64_t i = 0; i < kSamples && size > 0; ++i)
            found[i] = data[static_cast<int64_t>((static_cast<uint64_t>(i) * 2654435761u % 4294967296u) *
                                                     static_cast<unsigned __int128>(size) >>
                                                 32)];
        for (const uint32_t bits : found) hash = (hash ^ bits) * 0x100000001b3ull;
    }
    return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("pack_weight", TORCH_BOX(&rk::cpu::pack));
    m.impl("packed_encoder", TORCH_BOX(&rk::cpu::encode));
    m.impl("sample_weights", TORCH_BOX(&rk::cpu::sample));
}
