// AMX: each tile instruction behind one function, and for machines without it a twin of each in plain C++, so that the
// same kernels run and are tested anywhere (RK_AMX_TWIN chooses the twin when a file is compiled).
//
// A thread has eight tiles of 16 rows x 64 bytes. C (16 x 16 numbers of 32 bits) += A B, with A as rows of K and B with
// what lies side by side along K in one 32-bit word:
//
//   tile_dot_bf16    A [16][32] bfloat16, B [16 pairs along K][16][2] bfloat16, C float32: 16 x 16 x 32 multiply-adds
//                    in 16 cycles, eight times what two 512-bit FMA units do
//   tile_dot_u8s8    A [16][64] uint8, B [16 fours along K][16][4] int8, C int32, which wraps around
//
// The arithmetic of tile_dot_bf16 (Intel's SDM, TDPBF16PS; measured, and the twin compared bit for bit): for each element
// of C two sums from zero, over the even and over the odd k, in the order of k, by fused multiply-adds; then
// C + (even + odd), each sum rounded. Always to nearest even, whatever MXCSR says. Denormal operands count as zero of
// their sign, C included, and what is smaller than 2^-126 after rounding to 24 bits becomes zero. Infinities and NaNs as
// in IEEE 754. All of it is equal in the twin but the sign and payload of a NaN.
//
// Tiles are configured by thread, and other code in the same thread configures them too (oneDNN, which torch's bfloat16
// products run on, and which may leave its configuration behind for its next call). So whoever uses tiles holds a
// TileUse: it configures all eight at full size, and at its end puts back what was there.
#pragma once
#include "csrc/cpu/simd.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int kTileSide = 16;     // rows of a tile, and 32-bit columns
constexpr int kTileBytes = 1024;  // of a tile: 16 rows of 64
constexpr int kTileRowBytes = 64;
constexpr int kTileFloats = kTileSide * kTileSide;

// What ldtilecfg reads.
struct alignas(64) TileConfig {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    static TileConfig full() {
        TileConfig config;
        config.palette = 1;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileRowBytes, config.rows[i] = kTileSide;
        return config;
    }
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

#if !defined(RK_AMX_TWIN)

class TileUse {
  public:
    TileUse() {
        const TileConfig full = TileConfig::full();
        asm volatile("sttilecfg %0" : "=m"(before_));
        asm volatile("ldtilecfg %0" : : "m"(full));
    }
    ~TileUse() {
        if (before_.palette == 0)
            asm volatile("tilerelease");
        else
            asm volatile("ldtilecfg %0" : : "m"(before_));
    }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;

  private:
    TileConfig before_;
};

template <int kTile>
RK_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows `stride` bytes apart.
template <int kTile>
RK_INLINE void tile_load(const void* from, int64_t stride = kTileRowBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
// The same for what is not read again soon: it should not push other things out of the first-level cache.
template <int kTile>
RK_INLINE void tile_load_once(const void* from, int64_t stride = kTileRowBytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
RK_INLINE void tile_store(void* to, int64_t stride = kTileRowBytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
RK_INLINE void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
RK_INLINE void tile_dot_u8s8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

#else

struct TwinTiles {
    alignas(64) char bytes[8][kTileBytes];
    int uses = 0;  // that hold the thread's tiles; without one a tile instruction is a fault
};
inline TwinTiles& twin_tiles() {
    static thread_local TwinTiles tiles;
    return tiles;
}
template <class T>
RK_INLINE T* twin_tile(int tile) {
    TwinTiles& tiles = twin_tiles();
    if (tiles.uses == 0) __builtin_trap();
    return reinterpret_cast<T*>(tiles.bytes[tile]);
}

class TileUse {
  public:
    TileUse() {
        TwinTiles& tiles = twin_tiles();
        ++tiles.uses;
        __builtin_memset(tiles.bytes, 0, sizeof tiles.bytes);  // as ldtilecfg does
    }
    ~TileUse() {
        TwinTiles& tiles = twin_tiles();
        --tiles.uses;
        __builtin_memset(tiles.bytes, 0, sizeof tiles.bytes);
    }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;
};

template <int kTile>
RK_INLINE void tile_zero() {
    __builtin_memset(twin_tile<char>(kTile), 0, kTileBytes);
}
template <int kTile>
RK_INLINE void tile_load(const void* from, int64_t stride = kTileRowBytes) {
    char* const tile = twin_tile<char>(kTile);
    for (int row = 0; row < kTileSide; ++row)
        __builtin_memcpy(tile + row * kTileRowBytes, static_cast<const char*>(from) + row * stride,
                         kTileRowBytes);
}
template <int kTile>
RK_INLINE void tile_load_once(const void* from, int64_t stride = kTileRowBytes) {
    tile_load<kTile>(from, stride);
}
template <int kTile>
RK_INLINE void tile_store(void* to, int64_t stride = kTileRowBytes) {
    const char* const tile = twin_tile<char>(kTile);
    for (int row = 0; row < kTileSide; ++row)
        __builtin_memcpy(static_cast<char*>(to) + row * stride, tile + row * kTileRowBytes, kTileRowBytes);
}

// A bfloat16 in the upper half of a word, denormals as zero.
RK_INLINE double twin_operand(uint32_t word) {
    return bit_cast<float>((word & 0x7f800000u) != 0 ? word : word & 0x80000000u);
}
// To 24 bits, to nearest even, and to zero where that is less than 2^-126. What is rounded is exact in double, or too
// far from any tie for its last bit to matter: operands have 16 and 24 bits.
RK_INLINE float twin_round(double x) {
    const float tiny = x < 0.0 || (x == 0.0 && __builtin_signbit(x)) ? -0.0f : 0.0f;
    const double size = x < 0.0 ? -x : x;
    return size < 0x1p-126 - 0x1p-151 ? tiny : float(x);
}
// C += A B for one row of A and of C.
inline void twin_dot_bf16_row(const uint32_t* a, const uint32_t* b, float* c) {
    float even[kTileSide] = {}, odd[kTileSide] = {};
    for (int k = 0; k < kTileSide; ++k, b += kTileSide) {
        const double even_a = twin_operand(a[k] << 16), odd_a = twin_operand(a[k] & 0xffff0000u);
        for (int n = 0; n < kTileSide; ++n) {
            even[n] = twin_round(even_a * twin_operand(b[n] << 16) + double(even[n]));
            odd[n] = twin_round(odd_a * twin_operand(b[n] & 0xffff0000u) + double(odd[n]));
        }
    }
    for (int n = 0; n < kTileSide; ++n)
        c[n] = twin_round(twin_operand(bit_cast<uint32_t>(c[n])) +
                          double(twin_round(double(even[n]) + double(odd[n]))));
}
template <int kC, int kA, int kB>
inline void tile_dot_bf16() {
    const uint32_t *a = twin_tile<uint32_t>(kA), *b = twin_tile<uint32_t>(kB);
    float* const c = twin_tile<float>(kC);
    for (int m = 0; m < kTileSide; ++m) twin_dot_bf16_row(a + m * kTileSide, b, c + m * kTileSide);
}
template <int kC, int kA, int kB>
inline void tile_dot_u8s8() {
    const uint8_t* a = twin_tile<uint8_t>(kA);
    const int8_t* b = twin_tile<int8_t>(kB);
    uint32_t* const c = twin_tile<uint32_t>(kC);
    for (int m = 0; m < kTileSide; ++m)
        for (int k = 0; k < kTileSide; ++k)
            for (int n = 0; n < kTileSide; ++n)
                for (int i = 0; i < 4; ++i)
                    c[m * kTileSide + n] += uint32_t(int32_t(a[m * kTileRowBytes + 4 * k + i]) *
                                                     int32_t(b[k * kTileRowBytes + 4 * n + i]));
}

#endif

}  // namespace rk::cpu::RK_CPU_ISA
