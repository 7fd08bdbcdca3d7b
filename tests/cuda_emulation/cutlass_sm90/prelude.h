// For the epilogue of CUTLASS's Hopper kernel (gelu_ffn_sm90_epilogue.cpp), included before all else.
//
// Where CUTLASS's functions hold PTX they have a second branch, which says that the host cannot run it. That
// branch is this emulation: it hands what the function was called with, by the names that CUTLASS gives its
// parameters, to instead_of(). A name that a function does not have is the one below.
#pragma once
#include "../cutlass/prelude.h"

struct NotAParameter {};
inline constexpr NotAParameter smem_src, smem_dst, src0, src1, src2, src3, dst0, dst1, dst2, dst3;

#include "cute/config.hpp"
#undef CUTE_INVALID_CONTROL_PATH
#define CUTE_INVALID_CONTROL_PATH(what) \
    ::emulation::instead_of(what, smem_src, smem_dst, src0, src1, src2, src3, dst0, dst1, dst2, dst3)

namespace emulation {

// stmatrix and ldmatrix, four matrices of 8 x 8 numbers of 16 bits: lane i names row i % 8 of matrix i / 8, and
// holds two neighbours of row i / 4 of each (PTX ISA, "stmatrix", "ldmatrix").
void store_matrices(const uint32_t (&from)[4], void* row);
void load_matrices(uint32_t (&to)[4], const void* row);
// The copy engine, from shared memory to the box that starts there; what lies outside of the tensor stays.
void store_box(const void* map, const void* shared, int x, int y, int z);

template <class T>
constexpr bool kGiven = !std::is_same_v<std::remove_cv_t<T>, NotAParameter>;

template <class From, class To, class S0, class S1, class S2, class S3, class D0, class D1, class D2,
          class D3>
void instead_of(const char* what, From& from, To& to, S0& s0, S1& s1, S2& s2, S3& s3, D0& d0, D1& d1, D2& d2,
                D3& d3) {
    if constexpr (kGiven<To> && kGiven<S3>) {
        if (std::strstr(what, "stmatrix") == nullptr) fail("%s", what);
        const uint32_t registers[4] = {s0, s1, s2, s3};
        store_matrices(registers, &to);
    } else if constexpr (kGiven<From> && kGiven<D3>) {
        if (std::strstr(what, "ldmatrix") == nullptr) fail("%s", what);
        uint32_t registers[4];
        load_matrices(registers, &from);
        d0 = registers[0], d1 = registers[1], d2 = registers[2], d3 = registers[3];
    } else if constexpr (kGiven<To> || kGiven<From> || kGiven<S0> || kGiven<D0>) {
        fail("not emulated: %s", what);
    }  // else: it commits or waits for copies, which are over at once
}

}  // namespace emulation
