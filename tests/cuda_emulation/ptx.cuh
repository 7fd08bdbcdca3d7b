// The emulation's csrc/cuda/ptx.cuh: the same functions in software, written from the PTX ISA.
#pragma once
#include <stdint.h>

namespace rk::cuda::ptx {

inline uint4 load_streaming(const void* global) {
    return *static_cast<const uint4*>(global);
}

inline float exp2(float x) {
    ::emulation::count(::emulation::Count::exponentials);
    const float y = std::exp2(x);
    return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

// cp.async: the bytes move when the thread waits for their group, and not before; what was to be read is
// looked at then.
template <int Bytes>
inline void copy_async(void* shared, const void* global, bool valid) {
    if (reinterpret_cast<uintptr_t>(shared) % Bytes != 0 || reinterpret_cast<uintptr_t>(global) % Bytes != 0)
        ::emulation::fail("cp.async of %d bytes, from %p to %p: not aligned", Bytes, global, shared);
    ::emulation::copy_async(shared, global, Bytes, valid);
}
inline void copy_async_16(void* shared, const void* global, bool valid) {
    copy_async<16>(shared, global, valid);
}
inline void copy_async_8(void* shared, const void* global, bool valid) {
    copy_async<8>(shared, global, valid);
}
inline void copy_async_commit() {
    ::emulation::commit_group();
}
template <int Pending>
inline void copy_async_wait() {
    ::emulation::wait_group(Pending);
}

// ldmatrix, PTX ISA "Warp-level matrix load instruction".
template <bool Transposed>
inline void load_matrices_as(uint32_t (&to)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0)
        ::emulation::fail("ldmatrix from %p: not a multiple of 16", shared_row);
    ::emulation::warp_collective(
        Transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &shared_row, to,
        [](const void* const in[32], void* const out[32], uint32_t) RK_UNSEEN {
            ::emulation::count_matrices(in);
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t rows[8][8];
                for (int row = 0; row < 8; ++row)
                    std::memcpy(rows[row], *static_cast<const void* const*>(in[matrix * 8 + row]), 16);
                for (int lane = 0; lane < 32; ++lane) {
                    const int g = lane / 4, t = lane % 4 * 2;
                    const uint32_t low = Transposed ? rows[t][g] : rows[g][t];
                    const uint32_t high = Transposed ? rows[t + 1][g] : rows[g][t + 1];
                    static_cast<uint32_t*>(out[lane])[matrix] = low | high << 16;
                }
            }
        });
}
inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
    load_matrices_as<false>(to, shared_row);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row) {
    load_matrices_as<true>(to, shared_row);
}

inline float from_bits(uint16_t bits, __nv_bfloat16) {
    return emulation_bits<float>(static_cast<uint32_t>(bits) << 16);
}
inline float from_bits(uint16_t bits, __half) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
}

// mma.m16n8k16, PTX ISA "Matrix fragments for mma.m16n8k16 with floating point type".
template <typename T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane {
        uint32_t a[4], b[2];
        float d[4];
    };
    const Lane mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    ::emulation::warp_collective(
        "mma", 0xffffffffu, &mine, d, [](const void* const in[32], void* const out[32], uint32_t) RK_UNSEEN {
            ::emulation::count(::emulation::Count::tensor_flops, 2 * 16 * 8 * 16);
            const auto element = [](uint32_t pair, int i) {
                return from_bits(static_cast<uint16_t>(pair >> 16 * i), T());
            };
            float left[16][16], right[8][16];  // [row][k], [column][k]
            for (int lane = 0; lane < 32; ++lane) {
                const Lane& from = *static_cast<const Lane*>(in[lane]);
                const int g = lane / 4, t = lane % 4 * 2;
                for (int i = 0; i < 2; ++i) {
                    for (int r = 0; r < 4; ++r)
                        left[g + r % 2 * 8][t + i + r / 2 * 8] = element(from.a[r], i);
                    for (int r = 0; r < 2; ++r) right[g][t + i + r * 8] = element(from.b[r], i);
                }
            }
            for (int lane = 0; lane < 32; ++lane) {
                const Lane& from = *static_cast<const Lane*>(in[lane]);
                for (int i = 0; i < 4; ++i) {
                    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                    float sum = from.d[i];
                    for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
                    static_cast<float*>(out[lane])[i] = sum;
                }
            }
        });
}

}  // namespace rk::cuda::ptx
