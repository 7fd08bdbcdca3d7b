// The variants of the ops, what is set of them and what ran; set_variant, get_variant and served for Python.
//
// setup.py says what was compiled: ROBERTA_KERNELS_SM90A, the files for sm_90a; ROBERTA_KERNELS_CUTLASS,
// those that need CUTLASS.
#include "csrc/cuda/variants.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>

namespace rk::cuda {
namespace {

struct Variant {
    const char* name;
    bool built;
};

#ifdef ROBERTA_KERNELS_SM90A
constexpr bool kSm90a = true;
#else
constexpr bool kSm90a = false;
#endif
#ifdef ROBERTA_KERNELS_CUTLASS
constexpr bool kCutlass = true;
#else
constexpr bool kCutlass = false;
#endif

// In the order of the enumerators.
constexpr Variant kAttention[] = {{"portable", true}, {"sm90", kSm90a}};
constexpr Variant kGeluFfn[] = {{"portable", true}, {"sm80", kCutlass}, {"sm90", kCutlass && kSm90a}};

std::atomic<int> attention_active{0}, gelu_ffn_active{0};
// [variant][direction]
using Calls = std::atomic<int64_t>[2];
Calls attention_calls[2], gelu_ffn_calls[3];

struct Op {
    const char* name;
    const Variant* variants;
    int count;
    std::atomic<int>* active;
    Calls* calls;
};

const Op kOps[] = {
    {"attention", kAttention, 2, &attention_active, attention_calls},
    {"gelu_ffn", kGeluFfn, 3, &gelu_ffn_active, gelu_ffn_calls},
};

const Op& find(const std::string& name) {
    std::string known;
    for (const Op& op : kOps) {
        if (name == op.name) return op;
        known += (known.empty() ? "" : ", ") + std::string(op.name);
    }
    throw std::runtime_error("no op \"" + name + "\" with variants: there are " + known);
}

}  // namespace

AttentionVariant attention_variant() {
    return static_cast<AttentionVariant>(attention_active.load(std::memory_order_relaxed));
}

GeluFfnVariant gelu_ffn_variant() {
    return static_cast<GeluFfnVariant>(gelu_ffn_active.load(std::memory_order_relaxed));
}

void note_served(AttentionVariant variant, Direction direction) {
    attention_calls[static_cast<int>(variant)][static_cast<int>(direction)].fetch_add(
        1, std::memory_order_relaxed);
}

void note_served(GeluFfnVariant variant, Direction direction) {
    gelu_ffn_calls[static_cast<int>(variant)][static_cast<int>(direction)].fetch_add(
        1, std::memory_order_relaxed);
}

int64_t served(const std::string& name, const std::string& variant, Direction direction) {
    const Op& op = find(name);
    for (int i = 0; i < op.count; ++i)
        if (variant == op.variants[i].name)
            return op.calls[i][static_cast<int>(direction)].load(std::memory_order_relaxed);
    throw std::runtime_error(name + " has no variant \"" + variant + "\"");
}

std::vector<std::string> variants_of(const std::string& name) {
    const Op& op = find(name);
    std::vector<std::string> built;
    for (int i = 0; i < op.count; ++i)
        if (op.variants[i].built) built.push_back(op.variants[i].name);
    return built;
}

void set_variant(const std::string& name, const std::string& variant) {
    const Op& op = find(name);
    for (int i = 0; i < op.count; ++i) {
        if (op.variants[i].built && variant == op.variants[i].name) {
            op.active->store(i, std::memory_order_relaxed);
            return;
        }
    }
    std::string known;
    for (const std::string& built : variants_of(name)) known += (known.empty() ? "" : ", ") + built;
    throw std::runtime_error(name + " has no variant \"" + variant + "\" in this build: it has " + known);
}

std::string get_variant(const std::string& name) {
    const Op& op = find(name);
    return op.variants[op.active->load(std::memory_order_relaxed)].name;
}

namespace {

void set_variant_op(std::string op, std::string variant) {
    set_variant(op, variant);
}

std::string get_variant_op(std::string op) {
    return get_variant(op);
}

int64_t served_op(std::string op, std::string variant, bool backward) {
    return served(op, variant, backward ? Direction::backward : Direction::forward);
}

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cuda, CompositeExplicitAutograd, m) {
    m.impl("set_variant", TORCH_BOX(&rk::cuda::set_variant_op));
    m.impl("get_variant", TORCH_BOX(&rk::cuda::get_variant_op));
    m.impl("served", TORCH_BOX(&rk::cuda::served_op));
}
