// In place of CUTLASS's: predicated accesses to memory.
#pragma once
#include <cstring>

#include "cutlass/arch/cache_operation.h"
#include "cutlass/cutlass.h"

namespace cutlass::arch {

template <typename AccessType, int LoadBytes, CacheOperation::Kind cache_op = CacheOperation::Always>
struct global_load {
    global_load(AccessType& to, const void* from, bool valid) {
        static_assert(sizeof(AccessType) == LoadBytes);
        if (reinterpret_cast<uintptr_t>(from) % LoadBytes != 0 && valid)
            ::emulation::fail("a load of %d bytes from %p: not aligned", LoadBytes, from);
        if (valid) std::memcpy(static_cast<void*>(&to), from, LoadBytes);
    }
};

template <typename AccessType, int StoreBytes>
struct global_store {
    global_store(const AccessType& from, void* to, bool valid) {
        static_assert(sizeof(AccessType) == StoreBytes);
        if (reinterpret_cast<uintptr_t>(to) % StoreBytes != 0 && valid)
            ::emulation::fail("a store of %d bytes to %p: not aligned", StoreBytes, to);
        if (valid) std::memcpy(to, static_cast<const void*>(&from), StoreBytes);
    }
};

}  // namespace cutlass::arch

#include "cutlass/arch/memory_sm75.h"
#include "cutlass/arch/memory_sm80.h"
