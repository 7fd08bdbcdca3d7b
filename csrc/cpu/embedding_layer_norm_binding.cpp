#include <vector>

#include "csrc/cpu/embedding_layer_norm.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

constexpr const char* kIdNames[kTables] = {"input_ids", "position_ids", "token_type_ids"};
constexpr const char* kTableNames[kTables] = {"word_embeddings", "position_embeddings",
                                              "token_type_embeddings"};

// Checked inputs; contiguous copies, where they were needed, live here.
struct Inputs {
    Checks checks;
    EmbeddingLayerNormArgs args;
    Tensor ids[kTables], tables[kTables], weight;
};

Inputs check(const char* op, const Tensor* const (&ids)[kTables], const Tensor* const (&tables)[kTables],
             const Tensor& weight) {
    const Checks checks(op, *tables[0], kTableNames[0]);
    checks.require(ids[0]->dim() == 1, "input_ids must have shape [T]");
    checks.require(tables[0]->dim() == 2, "word_embeddings must have shape [rows, H]");
    EmbeddingLayerNormArgs a{};
    a.bf16 = checks.bf16();
    a.rows = ids[0]->size(0);
    a.hidden = tables[0]->size(1);
    for (int t = 0; t < kTables; ++t) {
        checks.vector(*ids[t], kIdNames[t], a.rows, ScalarType::Long);
        STD_TORCH_CHECK(tables[t]->dim() == 2, op, ": ", kTableNames[t], " must have shape [rows, H]");
        a.table_rows[t] = tables[t]->size(0);
        checks.matrix(*tables[t], kTableNames[t], a.table_rows[t], a.hidden);
    }
    checks.vector(weight, "weight", a.hidden);
    Inputs in{checks,
              a,
              {as_contiguous(*ids[0]), as_contiguous(*ids[1]), as_contiguous(*ids[2])},
              {as_contiguous(*tables[0]), as_contiguous(*tables[1]), as_contiguous(*tables[2])},
              as_contiguous(weight)};
    for (int t = 0; t < kTables; ++t) {
        in.args.ids[t] = static_cast<const int64_t*>(in.ids[t].const_data_ptr());
        in.args.table[t] = in.tables[t].const_data_ptr();
        for (int64_t i = 0; i < a.rows; ++i) {
            const int64_t id = in.args.ids[t][i];
            STD_TORCH_CHECK(id >= 0 && id < a.table_rows[t], "index out of range in self: ", kIdNames[t], "[",
                            i, "] = ", id, ", but ", kTableNames[t], " has ", a.table_rows[t], " rows");
        }
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
    const char* op = "embedding_layer_norm";
    Inputs in = check(op, {&input_ids, &position_ids, &token_type_ids},
                      {&word_embeddings, &position_embeddings, &token_type_embeddings}, weight);
    EmbeddingLayerNormArgs& a = in.args;
    in.checks.vector(bias, "bias", a.hidden);
    const Tensor b = as_contiguous(bias);
    a.bias = b.const_data_ptr();
    a.eps = static_cast<float>(eps);
    a.dropout = in.checks.dropout(dropout_p, seed);
    Tensor out = in.checks.empty({a.rows, a.hidden});
    Tensor mean = in.checks.empty({a.rows}, ScalarType::Float);
    Tensor rstd = in.checks.empty({a.rows}, ScalarType::Float);
    a.out = out.mutable_data_ptr();
    a.mean = static_cast<float*>(mean.mutable_data_ptr());
    a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    RK_DISPATCH(embedding_layer_norm_forward, a);
    return {std::move(out), std::move(mean), std::move(rstd)};
}

// Groups tokens by id with a stable radix sort, 11 bits a pass, as many passes as the table's size needs.
struct Groups {
    std::vector<int32_t> order, start, unique;

    Groups(const int64_t* ids, int64_t tokens, int64_t table_rows) : order(tokens) {
        constexpr int kBits = 11;
        std::vector<int32_t> other(tokens);
        for (int64_t i = 0; i < tokens; ++i) order[i] = static_cast<int32_t>(i);
        for (int shift = 0; ((table_rows - 1) >> shift) > 0; shift += kBits) {
            int32_t counts[(1 << kBits) + 1] = {};
            for (int64_t i = 0; i < tokens; ++i) ++counts[((ids[i] >> shift) & ((1 << kBits) - 1)) + 1];
            for (int digit = 0; digit < (1 << kBits); ++digit) counts[digit + 1] += counts[digit];
            for (int32_t token : order) other[counts[(ids[token] >> shift) & ((1 << kBits) - 1)]++] = token;
            order.swap(other);
        }
        for (int64_t i = 0; i < tokens; ++i)
            if (i == 0 || ids[order[i]] != ids[order[i - 1]]) {
                start.push_back(static_cast<int32_t>(i));
                unique.push_back(static_cast<int32_t>(ids[order[i]]));
            }
        start.push_back(static_cast<int32_t>(tokens));
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& input_ids, const Tensor& position_ids, const Tensor& token_type_ids,
    const Tensor& word_embeddings, const Tensor& position_embeddings, const Tensor& token_type_embeddings,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, int64_t word_padding_idx,
    int64_t position_padding_idx, double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "embedding_layer_norm_backward";
    Inputs in = check(op, {&input_ids, &position_ids, &token_type_ids},
                      {&word_embeddings, &position_embeddings, &token_type_embeddings}, weight);
    EmbeddingLayerNormArgs& a = in.args;
    constexpr int64_t kIntMax = 2147483647;
    STD_TORCH_CHECK(a.rows < kIntMax, op, ": at most 2**31 - 2 tokens");
    for (int t = 0; t < kTables; ++t)
        STD_TORCH_CHECK(a.table_rows[t] <= kIntMax, op, ": ", kTableNames[t],
                        " may have at most 2**31 - 1 rows");
    in.checks.matrix(grad_out, "grad_out", a.rows, a.hidden);
    in.checks.vector(mean, "mean", a.rows, ScalarType::Float);
    in.checks.vector(rstd, "rstd", a.rows, ScalarType::Float);
    const Tensor g = as_contiguous(grad_out), m = as_contiguous(mean), r = as_contiguous(rstd);
    a.grad_out = g.const_data_ptr();
    a.mean = static_cast<float*>(m.data_ptr());
    a.rstd = static_cast<float*>(r.data_ptr());
    a.dropout = in.checks.dropout(dropout_p, seed);
    const int64_t padding_idx[kTables] = {word_padding_idx, position_padding_idx, -1};
    const Groups groups[kTables] = {{a.ids[0], a.rows, a.table_rows[0]},
                                    {a.ids[1], a.rows, a.table_rows[1]},
                                    {a.ids[2], a.rows, a.table_rows[2]}};
    Tensor grad_tables[kTables] = {in.checks.empty({a.table_rows[0], a.hidden}),
                                   in.checks.empty({a.table_rows[1], a.hidden}),
                                   in.checks.empty({a.table_rows[2], a.hidden})};
    for (int t = 0; t < kTables; ++t) {
        a.order[t] = groups[t].order.data();
        a.start[t] = groups[t].start.data();
        a.unique[t] = groups[t].unique.data();
        a.unique_count[t] = static_cast<int64_t>(groups[t].unique.size());
        a.padding_idx[t] = padding_idx[t];
        a.grad_table[t] = grad_tables[t].mutable_data_ptr();
    }
    Tensor grad_sum = in.checks.empty({a.rows, a.hidden}, ScalarType::Float);
    Tensor grad_weight = in.checks.empty({a.hidden});
    Tensor grad_bias = in.checks.empty({a.hidden});
    a.grad_sum = static_cast<float*>(grad_sum.mutable_data_ptr());
    a.grad_weight = grad_weight.mutable_data_ptr();
    a.grad_bias = grad_bias.mutable_data_ptr();
    RK_DISPATCH(embedding_layer_norm_backward, a);
    return {std::move(grad_tables[0]), std::move(grad_tables[1]), std::move(grad_tables[2]),
            std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("embedding_layer_norm_forward", TORCH_BOX(&rk::cpu::forward));
    m.impl("embedding_layer_norm_backward", TORCH_BOX(&rk::cpu::backward));
}
