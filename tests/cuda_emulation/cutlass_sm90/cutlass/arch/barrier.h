// CUTLASS's, but for the two waits that an epilogue's warpgroup makes: on the host they would not wait.
#pragma once
#define NamedBarrier NamedBarrierOfTheHost
#define ClusterTransactionBarrier ClusterTransactionBarrierOfTheHost
#include_next "cutlass/arch/barrier.h"
#undef NamedBarrier
#undef ClusterTransactionBarrier

namespace emulation {
void wait_for_load(const void* barrier);  // by all threads that call store(): the next part of C comes
}

namespace cutlass::arch {

struct NamedBarrier : NamedBarrierOfTheHost {
    using NamedBarrierOfTheHost::NamedBarrierOfTheHost;
    using NamedBarrierOfTheHost::sync;
    static void sync(uint32_t threads, ReservedNamedBarriers id) {
        ::emulation::block_barrier(static_cast<int>(id), static_cast<int>(threads), 0);
    }
};

struct ClusterTransactionBarrier : ClusterTransactionBarrierOfTheHost {
    void wait(uint32_t) const { ::emulation::wait_for_load(this); }
};

}  // namespace cutlass::arch
