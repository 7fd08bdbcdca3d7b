// What each launch does, counted: sectors of global memory, wavefronts of shared memory, barriers, operations
// of the units. In a build for counting (build.py, "counted") every kernel is compiled without optimisation
// and with g++'s instrumentation for its thread sanitizer, so that each load and store of its source is seen
// once (emulator_proxies.cpp takes the calls). README.md says what the numbers are.
//
// A warp's accesses are put together again: what its lanes did in the same place of the code (the call stack),
// at the same turn since they last met, was one instruction. So counts do not depend on the order in which
// the emulation ran the threads.
#include <dlfcn.h>

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulation.h"

// Of this library, by the linker: static __shared__ arrays lie between them.
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

namespace emulation {
namespace {

constexpr int kCounts = static_cast<int>(Count::kinds);
constexpr uint64_t kSector = 32;  // bytes
constexpr int kBanks = 32;        // of 4 bytes, one of each a clock

struct Counted {
    int64_t code;  // of the kernel, from the start of this library
    int64_t of[kCounts];
};

struct Request {
    uint32_t lanes = 0;
    bool store = false;
    const void* at[32];
    size_t bytes = 0;
};

struct WarpRequests {
    std::unordered_map<uint64_t, Request> open;
    std::unordered_map<uint64_t, uint32_t> turns[32];
    uint32_t met[32] = {};  // barriers of the block, by lane
};

bool on = false;
std::vector<Counted> launches;
std::vector<WarpRequests> warps;
std::unordered_set<uint64_t> loaded, stored;  // sectors of this launch
const char* library = nullptr;                // where it begins

int64_t& now(Count what) {
    return launches.back().of[static_cast<int>(what)];
}

bool in_dynamic_shared(const void* at) {
    const auto* const byte = static_cast<const unsigned char*>(at);
    return byte >= shared_memory() && byte < shared_memory() + shared_bytes();
}
bool in_library(const void* at) {
    return at >= library && at < _end;
}
bool in_static_shared(const void* at) {
    return at >= __bss_start && at < _end;
}

// Wavefronts of one request: 4 bytes a lane go at once, 8 bytes by half warps, 16 by quarters; lanes of those
// that name different words of a bank wait for each other. (NVIDIA publishes no more than that; Nsight counts
// like this.)
void count_shared(const void* const* at, uint32_t lanes, size_t bytes) {
    const int together = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
    int64_t wavefronts = 0, least = 0;
    for (int first = 0; first < 32; first += together) {
        std::unordered_set<uint64_t> words[kBanks];
        for (int lane = first; lane < first + together; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const auto from = reinterpret_cast<uintptr_t>(at[lane]) / 4;
            const auto to = (reinterpret_cast<uintptr_t>(at[lane]) + bytes - 1) / 4;
            for (uint64_t word = from; word <= to; ++word) words[word % kBanks].insert(word);
        }
        size_t most = 0, all = 0;
        for (const auto& bank : words) {
            most = std::max(most, bank.size());
            all += bank.size();
        }
        wavefronts += static_cast<int64_t>(most);
        least += static_cast<int64_t>((all + kBanks - 1) / kBanks);
    }
    now(Count::shared_requests) += 1;
    now(Count::shared_wavefronts) += wavefronts;
    now(Count::shared_conflicts) += wavefronts - least;
}

void count_global(const void* const* at, uint32_t lanes, size_t bytes, bool store) {
    std::unordered_set<uint64_t> sectors;
    for (int lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        const auto from = reinterpret_cast<uintptr_t>(at[lane]) / kSector;
        const auto to = (reinterpret_cast<uintptr_t>(at[lane]) + bytes - 1) / kSector;
        for (uint64_t sector = from; sector <= to; ++sector) sectors.insert(sector);
    }
    now(store ? Count::store_requests : Count::load_requests) += 1;
    if (bytes == 16 && !store) now(Count::vector_load_requests) += 1;
    now(store ? Count::store_sectors : Count::load_sectors) += static_cast<int64_t>(sectors.size());
    (store ? stored : loaded).insert(sectors.begin(), sectors.end());
}

void close(WarpRequests& warp) {
    for (const auto& [place, request] : warp.open) {
        const int first = __builtin_ctz(request.lanes);
        if (in_dynamic_shared(request.at[first]) || in_static_shared(request.at[first]))
            count_shared(request.at, request.lanes, request.bytes);
        else
            count_global(request.at, request.lanes, request.bytes, request.store);
    }
    warp.open.clear();
    for (auto& turns : warp.turns) turns.clear();
}

uint64_t mixed(uint64_t a, uint64_t b) {
    uint64_t x = (a ^ b * 0x9e3779b97f4a7c15ull) + 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    return (x ^ x >> 27) * 0x94d049bb133111ebull;
}

}  // namespace

bool counting() {
    return on;
}

void count(Count what, int64_t more) {
    if (on && !launches.empty()) now(what) += more;
}

void begin_counts(const void* code) {
    if (!on) return;
    Dl_info found{};
    dladdr(reinterpret_cast<const void*>(&begin_counts), &found);
    library = static_cast<const char*>(found.dli_fbase);
    launches.push_back({static_cast<const char*>(code) - library, {}});
    loaded.clear();
    stored.clear();
}

void begin_counts_of_block(int threads) {
    if (on) warps.assign(static_cast<size_t>((threads + 31) / 32), WarpRequests{});
}

void end_counts_of_block() {
    if (!on) return;
    for (WarpRequests& warp : warps) close(warp);
    now(Count::distinct_load_sectors) = static_cast<int64_t>(loaded.size());
    now(Count::distinct_store_sectors) = static_cast<int64_t>(stored.size());
}

void count_meeting(int warp) {
    if (on) close(warps[static_cast<size_t>(warp)]);
}

void count_barrier(int thread) {
    if (!on) return;
    now(Count::barrier_arrivals) += 1;
    WarpRequests& warp = warps[static_cast<size_t>(thread / 32)];
    warp.met[thread % 32] += 1;
    warp.turns[thread % 32].clear();
}

void count_access(const void* address, size_t bytes, bool store, uint64_t place) {
    const int thread = running_thread();
    if (!on || thread < 0 || address == nullptr) return;
    const bool is_shared = in_dynamic_shared(address) || in_static_shared(address);
    if (!is_shared && (in_library(address) || in_a_stack(address))) return;
    if (bytes > 16) {  // a structure: as many instructions as it has 16 bytes
        const auto* const at = static_cast<const unsigned char*>(address);
        for (size_t i = 0; i < bytes; i += 16)
            count_access(at + i, std::min<size_t>(16, bytes - i), store, mixed(place, i));
        return;
    }
    WarpRequests& warp = warps[static_cast<size_t>(thread / 32)];
    const int mine = thread % 32;
    const uint64_t here = mixed(place, 2 * warp.met[mine] + store);
    Request& request = warp.open[mixed(here, warp.turns[mine][here]++)];
    request.lanes |= 1u << mine;
    request.store = store;
    request.bytes = std::max(request.bytes, bytes);
    request.at[mine] = address;
}

void count_matrices(const void* const in[32]) {
    if (!on) return;
    const void* rows[32];
    for (int lane = 0; lane < 32; ++lane) rows[lane] = *static_cast<const void* const*>(in[lane]);
    count_shared(rows, 0xffffffffu, 16);
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
    if (on) {
        const uint64_t place = place_of_caller(static_cast<void* const*>(__builtin_frame_address(0)));
        if (valid) count_access(global, bytes, false, place);
        count_access(shared, bytes, true, place);
    }
    defer([=] {
        if (valid)
            std::memcpy(shared, global, bytes);
        else
            std::memset(shared, 0, bytes);
    });
}

void count_copy(const void* global, size_t bytes, bool store) {
    if (!on || bytes == 0) return;
    const auto from = reinterpret_cast<uintptr_t>(global) / kSector;
    const auto to = (reinterpret_cast<uintptr_t>(global) + bytes - 1) / kSector;
    now(store ? Count::store_sectors : Count::load_sectors) += static_cast<int64_t>(to - from + 1);
    for (uint64_t sector = from; sector <= to; ++sector) (store ? stored : loaded).insert(sector);
}

}  // namespace emulation

extern "C" {

__attribute__((visibility("default"))) void rk_emulation_set_counting(int wanted) {
    emulation::on = wanted != 0;
    emulation::launches.clear();
}

// Copies the counts of the launches since the last call (each: where its kernel's code lies in this library,
// then a number for each Count), at most `room` of them, and forgets them; returns how many there were.
__attribute__((visibility("default"))) int64_t rk_emulation_take_counts(int64_t* to, int64_t room) {
    const auto count = static_cast<int64_t>(emulation::launches.size());
    for (int64_t i = 0; i < std::min(count, room); ++i)
        std::memcpy(to + (1 + emulation::kCounts) * i, &emulation::launches[static_cast<size_t>(i)],
                    sizeof(emulation::Counted));
    emulation::launches.clear();
    return count;
}
}
