#include <array>

#include "csrc/cuda/embedding_layer_norm.h"
#include "csrc/cuda/tensor_checks.h"

namespace rk::cuda {
namespace {

constexpr const char* kIdNames[kTables] = {"input_ids", "position_ids", "token_type_ids"};
constexpr const char* kTableNames[kTables] = {"word_embeddings", "position_embeddings",
                                              "token_type_embeddings"};

// Checked inputs; contiguous copies, where they were needed, live here. The values of the ids are the
// device's: to look at them here would take a synchronisation.
struct Inputs {
    EmbeddingLayerNormArgs args{};
    Tensor ids[kTables], tables[kTables], weight;
};

Inputs check(const Checks& checks, const Tensor* const (&ids)[kTables],
             const Tensor* const (&tables)[kTables], const Tensor& weight, double dropout_p,
             const std::optional<Tensor>& seed) {
    checks.require(ids[0]->dim() == 1, "input_ids must have shape [T]");
    checks.require(tables[0]->dim() == 2, "word_embeddings must have shape [rows, H]");
    EmbeddingLayerNormArgs a{};
    a.rows = ids[0]->size(0);
    a.hidden = tables[0]->size(1);
    a.dtype = checks.dtype();
    for (int t = 0; t < kTables; ++t) {
        checks.vector(*ids[t], kIdNames[t], a.rows, ScalarType::Long);
        checks.require(tables[t]->dim() == 2, "the tables must have shape [rows, H]");
        a.table_rows[t] = tables[t]->size(0);
        checks.matrix(*tables[t], kTableNames[t], a.table_rows[t], a.hidden);
    }
    constexpr int64_t kMost = 2147483647;
    checks.require(a.table_rows[0] <= kMost && a.table_rows[1] <= kMost && a.table_rows[2] <= kMost &&
                       a.table_rows[0] + a.table_rows[1] + a.table_rows[2] <= kMost,
                   "the tables may have at most 2**31 - 1 rows together");
    checks.vector(weight, "weight", a.hidden);
    a.dropout = checks.dropout(dropout_p, seed);
    const OnDeviceOf device(weight);
    a.stream = device.stream();
    Inputs in{a,
              {as_contiguous(*ids[0]), as_contiguous(*ids[1]), as_contiguous(*ids[2])},
              {as_aligned(*tables[0]), as_aligned(*tables[1]), as_aligned(*tables[2])},
              as_aligned(weight)};
    for (int t = 0; t < kTables; ++t) {
        in.args.ids[t] = static_cast<const int64_t*>(in.ids[t].const_data_ptr());
        in.args.table[t] = in.tables[t].const_data_ptr();
    }
    in.args.weight = in.weight.const_data_ptr();
    return in;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input_ids, const Tensor& position_ids,
                                           const Tensor& token_type_ids, const Tensor& word_embeddings,
                                           const Tensor& position_embeddings,
                                           const Tensor& token_type_embeddings, const Tensor& weight,
                                           const Tensor& bias, double eps, int64_t /*word_padding_idx*/,
                                           int64_t /*position_padding_idx*/, double dropout_p,
                                           const std::optional<Tensor>& seed) {
    const Checks checks("embedding_layer_norm", word_embeddings, kTableNames[0]);
    const OnDeviceOf device(word_embeddings);
    Inputs in =
        check(checks, {&input_ids, &position_ids, &token_type_ids},
              {&word_embeddings, &position_embeddings, &token_type_embeddings}, weight, dropout_p, seed);
    EmbeddingLayerNormArgs& a = in.args;
    checks.vector(bias, "bias", a.hidden);
    const Tensor b = as_aligned(bias);
    Tensor out = checks.empty({a.rows, a.hidden});
    Tensor mean = checks.empty({a.rows}, ScalarType::Float), rstd = checks.empty({a.rows}, ScalarType::Float);
    a.bias = b.const_data_ptr();
    a.eps = static_cast<float>(eps);
    a.out = out.mutable_data_ptr();
    a.mean = static_cast<float*>(mean.mutable_data_ptr());
    a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    embedding_layer_norm_forward(a);
    return {std::move(out), std::move(mean), std::move(rstd)};
}

// (sorted, where each came from), equal ones in their order.
std::pair<Tensor, Tensor> stable_sort(const Tensor& keys) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                                      from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& input_ids, const Tensor& position_ids, const Tensor& token_type_ids,
    const Tensor& word_embeddings, const Tensor& position_embeddings, const Tensor& token_type_embeddings,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, int64_t word_padding_idx,
    int64_t position_padding_idx, double dropout_p, const std::optional<Tensor>& seed) {
    const Checks checks("embedding_layer_norm_backward", word_embeddings, kTableNames[0]);
    const OnDeviceOf device(word_embeddings);
    Inputs in =
        check(checks, {&input_ids, &position_ids, &token_type_ids},
              {&word_embeddings, &position_embeddings, &token_type_embeddings}, weight, dropout_p, seed);
    EmbeddingLayerNormArgs& a = in.args;
    checks.matrix(grad_out, "grad_out", a.rows, a.hidden);
    checks.vector(mean, "mean", a.rows, ScalarType::Float);
    checks.vector(rstd, "rstd", a.rows, ScalarType::Float);
    const Tensor g = as_aligned(grad_out), m = as_contiguous(mean), r = as_contiguous(rstd);
    a.grad_out = g.const_data_ptr();
    a.mean = static_cast<float*>(m.data_ptr());
    a.rstd = static_cast<float*>(r.data_ptr());
    a.padding_idx[0] = word_padding_idx;
    a.padding_idx[1] = position_padding_idx;
    a.padding_idx[2] = -1;
    Tensor grad_tables[kTables] = {checks.empty({a.table_rows[0], a.hidden}),
                                   checks.empty({a.table_rows[1], a.hidden}),
                                   checks.empty({a.table_rows[2], a.hidden})};
    for (int t = 0; t < kTables; ++t) {
        if (t < sorted_tables(a)) torch::stable::zero_(grad_tables[t]);
        a.grad_table[t] = grad_tables[t].mutable_data_ptr();
    }
    Tensor grad_weight = checks.empty({a.hidden}), grad_bias = checks.empty({a.hidden});
    a.grad_weight = grad_weight.mutable_data_ptr();
    a.grad_bias = grad_bias.mutable_data_ptr();

    Tensor grad_sum = checks.empty({a.rows, a.hidden}, ScalarType::Float);
    Tensor partials = checks.empty({embedding_layer_norm_partials(a)}, ScalarType::Float);
    Tensor pieces = checks.empty({embedding_layer_norm_pieces(a)}, ScalarType::Float);
    Tensor keys = checks.empty({sorted_tables(a) * a.rows},
                               embedding_layer_norm_narrow_keys(a) ? ScalarType::Short : ScalarType::Int);
    a.keys = keys.mutable_data_ptr();
    embedding_layer_norm_keys(a);
    const auto [sorted_keys, order] = stable_sort(keys);
    a.sorted_keys = sorted_keys.const_data_ptr();
    a.order = static_cast<const int64_t*>(order.const_data_ptr());
    a.grad_sum = static_cast<float*>(grad_sum.mutable_data_ptr());
    a.partials = static_cast<float*>(partials.mutable_data_ptr());
    a.pieces = static_cast<float*>(pieces.mutable_data_ptr());
    embedding_layer_norm_backward(a);
    return {std::move(grad_tables[0]), std::move(grad_tables[1]), std::move(grad_tables[2]),
            std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cuda, RK_DISPATCH_KEY, m) {
    m.impl("embedding_layer_norm_forward", TORCH_BOX(&rk::cuda::forward));
    m.impl("embedding_layer_norm_backward", TORCH_BOX(&rk::cuda::backward));
}
