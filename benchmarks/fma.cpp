// The rate of float32 multiply-adds of one core: independent sums in registers, no memory. As many sums as
// cover the latency of the instruction (4 cycles, two a cycle), and as the smallest register file (16) holds.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kSums = 12, kLanes = kBytes / 4;
typedef float Vector __attribute__((vector_size(kBytes)));

// Sum `kIndex` and those after it, each a variable of its own: the compiler keeps an array of them in memory.
template <int kIndex>
struct Sums {
    Vector sum;
    Sums<kIndex - 1> others;
    void start(Vector from) {
        sum = from + static_cast<float>(kIndex);
        others.start(from);
    }
    __attribute__((always_inline)) void step(Vector factor, Vector addend) {
        sum = sum * factor + addend;
        others.step(factor, addend);
    }
    float total() const { return sum[0] + others.total(); }
};
template <>
struct Sums<0> {
    void start(Vector) {}
    __attribute__((always_inline)) void step(Vector, Vector) {}
    float total() const { return 0.0f; }
};

// Runs `rounds` rounds and returns the number of operations, two for each multiply-add. *out keeps them from
// being left out.
extern "C" long long multiply_add(long long rounds, float* out) {
    Vector factor, addend;
    for (int lane = 0; lane < kLanes; ++lane) {
        factor[lane] = 0.999f;
        addend[lane] = 0.001f * static_cast<float>(lane);
    }
    Sums<kSums> sums;
    sums.start(addend);
    for (long long round = 0; round < rounds; ++round) sums.step(factor, addend);
    *out = sums.total();
    return rounds * kSums * kLanes * 2;
}
