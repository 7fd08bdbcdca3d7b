// A program that lays out attention's launches for sizes that no test can run, and says what is wrong with
// them.
#include <stdio.h>

#include "csrc/cuda/attention_plan.h"

using namespace rk::cuda;
using namespace rk::cuda::attention;

static int failures = 0;
static void expect(bool holds, const char* what, const Sizes& s, size_t shared, long long work) {
    if (holds) return;
    ++failures;
    printf("%s: batch %lld heads %lld head_dim %lld lengths %lld %lld: shared %zu work %lld\n", what,
           (long long)s.batch, (long long)s.heads, (long long)s.head_dim, (long long)s.max_seqlen_q,
           (long long)s.max_seqlen_k, shared, work);
}

static void check(const Sizes& s, const Machine& machine) {
    const int64_t pairs = s.batch * s.heads;
    const ForwardPlan f = plan_forward(s, machine);
    expect(f.d >= s.head_dim && f.d <= 128, "padded head dim", s, f.shared_bytes, f.work);
    expect(f.warps >= 1 && f.warps <= kMostForwardWarps, "warps", s, f.shared_bytes, f.work);
    expect(f.groups == 1 || (f.groups == 2 && f.d <= 64 && !s.dropout), "groups", s, f.shared_bytes, f.work);
    expect(f.slots >= 1 && (f.slots >= 2 || s.max_seqlen_k <= forward_tile(s.dtype)), "slots", s,
           f.shared_bytes, f.work);
    expect(f.shared_bytes <= machine.shared_bytes_per_block, "shared memory", s, f.shared_bytes, f.work);
    expect(f.splits >= 1 && f.splits < 2147483647, "splits", s, f.shared_bytes, f.work);
    expect(f.work == (s.max_seqlen_q == 0 ? 0 : pairs * f.splits), "work", s, f.shared_bytes, f.work);
    for (const bool owns_keys : {true, false}) {
        const BackwardPlan b = plan_backward(s, machine, owns_keys);
        const int64_t own = owns_keys ? s.max_seqlen_k : s.max_seqlen_q;
        expect(b.warps >= 1 && b.warps <= kMostBackwardWarps, "backward warps", s, b.shared_bytes, b.work);
        expect(b.slots >= 1, "backward slots", s, b.shared_bytes, b.work);
        expect(b.shared_bytes <= machine.shared_bytes_per_block, "backward shared memory", s, b.shared_bytes,
               b.work);
        expect(b.tiles * b.warps * 16 >= own && b.tiles < 2147483647, "backward tiles", s, b.shared_bytes,
               b.work);
        expect(b.work == pairs * b.tiles, "backward work", s, b.shared_bytes, b.work);
    }
    if (const auto b = plan_backward_of_sequences(s, machine)) {
        expect(b->warps * 16 >= s.max_seqlen_k && b->warps <= kMostBackwardWarps, "sequence warps", s,
               b->shared_bytes, b->work);
        expect(b->shared_bytes <= machine.shared_bytes_per_block, "sequence shared memory", s,
               b->shared_bytes, b->work);
        expect(b->work == pairs && b->slots >= 1, "sequence work", s, b->shared_bytes, b->work);
    }
}

int main() {
    const int64_t most = 2147483647;
    for (const size_t shared : {99 * 1024, 163 * 1024, 227 * 1024})
        for (const int multiprocessors : {1, 28, 132})
            for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
                for (const int64_t head_dim : {16, 40, 64, 72, 96, 104, 128})
                    for (const int64_t heads : {1, 12, 70000})
                        for (const int64_t batch : {0, 1, 64, 5462, 178956970})
                            for (const int64_t q : {int64_t(0), int64_t(1), int64_t(17), int64_t(128),
                                                    int64_t(512), int64_t(8192), most / heads})
                                for (const int64_t k :
                                     {int64_t(0), int64_t(1), int64_t(128), int64_t(513), most / heads})
                                    for (const int flags : {0, 1, 2, 3})
                                        check({batch, heads, head_dim, q, k, dtype, (flags & 1) != 0,
                                               (flags & 2) != 0},
                                              {multiprocessors, shared});
    if (statistics_blocks(0, 12) != 0 || statistics_blocks(1, 1) != 1 ||
        statistics_blocks(most, 70000) > kMostBlocks)
        ++failures;
    return failures != 0;
}
