// CUTLASS's, but for the copy from shared memory.
#pragma once
#define SM90_TMA_STORE SM90_TMA_STORE_OfTheHost
#include_next "cute/arch/copy_sm90_tma.hpp"
#undef SM90_TMA_STORE

namespace cute {

struct SM90_TMA_STORE {
    static void copy(const void* map, const void* shared, const int32_t& x, const int32_t& y) {
        ::emulation::store_box(map, shared, x, y, 0);
    }
    static void copy(const void* map, const void* shared, const int32_t& x, const int32_t& y,
                     const int32_t& z) {
        ::emulation::store_box(map, shared, x, y, z);
    }
};

}  // namespace cute
