// The rates of one core's arithmetic units: independent sums in registers, no memory. Each function runs `rounds`
// rounds and returns the number of operations, two for each multiply-add, or 0 where this processor has no such
// instruction. *out keeps them from being left out.
#if defined(__AVX512F__) || defined(__AVX2__)
#    include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

// As many sums as cover the latency of the instruction (4 cycles, two a cycle), and as the smallest register file (16)
// holds.

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

extern "C" long long multiply_add(long long rounds, float* out) {
    Vector factor, addend;
    for (int lane = 0; lane < kLanes; ++lane) {
        factor[lane] = 0.999f;
        addend[lane] =
            0.001f * static_cast<float>(lane + 1);  // none is 0: the sum would decay to a denormal number
    }
    Sums<kSums> sums;
    sums.start(addend);
    for (long long round = 0; round < rounds; ++round) sums.step(factor, addend);
    *out = sums.total();
    return rounds * kSums * kLanes * 2;
}

#if defined(__AMX_TILE__)

// Four sums of two by two tiles of operands: 16 x 16 results, 64 bytes along K.
template <class Dot>
static long long on_tiles(long long rounds, float* out, int along_k, Dot dot) {
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0;  // ARCH_REQ_XCOMP_PERM for the tiles' data
    alignas(64) unsigned char config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // Numbers, not zeros: how fast the units are may depend on what they multiply.
    alignas(64) unsigned short operand[512];
    unsigned state = 1;
    const auto fill = [&] {
        for (unsigned short& word : operand) {
            state = state * 1664525u + 1013904223u;
            // As bfloat16: either sign, sizes from 2^-7 to 2. As bytes: any, but for a few bits.
            word = static_cast<unsigned short>(0x3c00u | ((state >> 16) & 0x83ffu));
        }
        asm volatile("" ::: "memory");  // what loads a tile does not say that it reads this
    };
    fill();
    _tile_loadd(4, operand, 64);
    fill();
    _tile_loadd(5, operand, 64);
    fill();
    _tile_loadd(6, operand, 64);
    fill();
    _tile_loadd(7, operand, 64);
    for (long long round = 0; round < rounds; ++round) dot();
    alignas(64) float sums[256];
    _tile_stored(0, sums, 64);
    _tile_release();
    *out = sums[0];
    return rounds * 4 * 16 * 16 * along_k * 2;
}

extern "C" long long dot_bfloat16(long long rounds, float* out) {
    return on_tiles(rounds, out, 32, [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    });
}

extern "C" long long dot_int8(long long rounds, float* out) {
    return on_tiles(rounds, out, 64, [] {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    });
}

#else

// Twelve sums of vectors; the operands are opaque to the compiler, which would else fold the loop.
template <class Vector, class Dot>
static long long on_vectors(long long rounds, float* out, Vector zero, int along_k, Dot dot) {
    Vector sums[kSums];
    for (auto& sum : sums) sum = zero;
    for (long long round = 0; round < rounds; ++round) {
#    pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) {
            sums[i] = dot(sums[i]);
            asm volatile("" : "+v"(sums[i]));
        }
    }
    for (int i = 1; i < kSums; ++i) sums[0] = dot(sums[i]);
    __builtin_memcpy(out, &sums[0], sizeof *out);
    return rounds * kSums * static_cast<long long>(sizeof(Vector) / 4) * along_k * 2;
}

extern "C" long long dot_bfloat16(long long rounds, float* out) {
#    if defined(__AVX512BF16__)
    const auto operand = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0));
    return on_vectors(rounds, out, _mm512_setzero_ps(), 2,
                      [&](__m512 sum) { return _mm512_dpbf16_ps(sum, operand, operand); });
#    else
    return static_cast<void>(rounds), static_cast<void>(out), 0;
#    endif
}

extern "C" long long dot_int8(long long rounds, float* out) {
#    if defined(__AVX512VNNI__)
    const auto operand = _mm512_set1_epi32(0);
    return on_vectors(rounds, out, _mm512_setzero_si512(), 4,
                      [&](__m512i sum) { return _mm512_dpbusd_epi32(sum, operand, operand); });
#    else
    return static_cast<void>(rounds), static_cast<void>(out), 0;
#    endif
}

#endif
