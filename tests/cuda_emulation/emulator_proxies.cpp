// The two ways to shared memory: a thread's own loads and stores go by the generic proxy, the copy engine and
// the tensor cores by the asynchronous one, and only fence_shared_async orders the one before the other (PTX
// ISA 8.5, "Proxies"). Shared memory is what threads see; a shadow of it is what the asynchronous proxy sees:
// copies write both, and a thread's fence writes to the shadow what this thread has stored. Likewise, bytes
// that a thread has loaded are not to be overwritten by a copy before its fence.
//
// A thread's loads and stores are known where its kernel was compiled with -fsanitize=thread: of that
// sanitizer there is the instrumentation alone, whose functions are those at the end of this file.
#include <vector>

#include "emulation.h"

namespace emulation {
namespace {

constexpr size_t kMostShared = 256 * 1024;

struct Bytes {
    uint32_t at, count;
};

// Of one thread, since its last fence.
struct Unfenced {
    std::vector<Bytes> loads, stores;
};

bool instrumented = false;  // some kernel of this process is
unsigned char shadow[kMostShared];
uint16_t loads_of[kMostShared];  // how often the byte is in some thread's loads
std::vector<Unfenced> threads;
const unsigned char* memory = nullptr;
size_t memory_bytes = 0;

void note(const void* address, size_t size, bool store) {
    const auto at = static_cast<size_t>(static_cast<const unsigned char*>(address) - memory);
    if (at >= memory_bytes) return;
    const int thread = running_thread();
    if (thread < 0) return;
    Unfenced& unfenced = threads[static_cast<size_t>(thread)];
    const Bytes bytes{static_cast<uint32_t>(at), static_cast<uint32_t>(std::min(size, memory_bytes - at))};
    if (store) {
        unfenced.stores.push_back(bytes);
        return;
    }
    unfenced.loads.push_back(bytes);
    for (uint32_t i = 0; i < bytes.count; ++i) ++loads_of[at + i];
}

// Inline: its frame is that of the function that the kernel called.
inline __attribute__((always_inline)) void see(const void* address, size_t size, bool store) {
    if (counting() && running_thread() >= 0)
        count_access(address, size, store,
                     place_of_caller(static_cast<void* const*>(__builtin_frame_address(0))));
    note(address, size, store);
}

bool holds(const std::vector<Bytes>& list, uint32_t from, uint32_t count) {
    return std::any_of(list.begin(), list.end(),
                       [&](const Bytes& b) { return b.at < from + count && from < b.at + b.count; });
}

}  // namespace

uint64_t place_of_caller(void* const* frame) {
    uint64_t place = 0;
    for (int depth = 0; depth < 8 && in_running_stack(frame, 16); ++depth) {
        place = place * 0x9e3779b97f4a7c15ull + reinterpret_cast<uintptr_t>(frame[1]);
        void* const* const above = static_cast<void* const*>(frame[0]);
        if (above <= frame) break;
        frame = above;
    }
    return place;
}

void begin_proxies(int count) {
    memory = shared_memory();
    memory_bytes = instrumented ? shared_bytes() : 0;
    std::memcpy(shadow, memory, memory_bytes);
    std::memset(loads_of, 0, memory_bytes * sizeof(loads_of[0]));
    threads.assign(static_cast<size_t>(count), Unfenced{});
}

void fence_shared_async() {
    if (memory_bytes == 0) return;
    Unfenced& mine = threads[static_cast<size_t>(running_thread())];
    for (const Bytes& b : mine.stores) std::memcpy(shadow + b.at, memory + b.at, b.count);
    for (const Bytes& b : mine.loads)
        for (uint32_t i = 0; i < b.count; ++i) --loads_of[b.at + i];
    mine.stores.clear();
    mine.loads.clear();
}

void write_async(uint32_t at, const void* from, uint32_t count) {
    std::memcpy(shared_memory() + at, from, count);
    if (memory_bytes != 0) std::memcpy(shadow + at, from, count);
}

void demand_fenced_stores(const char* what, uint32_t at, uint32_t count) {
    if (memory_bytes == 0 || std::memcmp(shadow + at, memory + at, count) == 0) return;
    for (size_t thread = 0; thread < threads.size(); ++thread)
        if (holds(threads[thread].stores, at, count))
            fail("%s meets bytes at %u that thread %zu has stored, without fence_shared_async since", what,
                 at, thread);
    fail("%s meets bytes at %u that were stored without fence_shared_async", what, at);
}

void demand_fenced_loads(const char* what, uint32_t at, uint32_t count) {
    if (memory_bytes == 0) return;
    if (std::all_of(loads_of + at, loads_of + at + count, [](uint16_t loads) { return loads == 0; })) return;
    for (size_t thread = 0; thread < threads.size(); ++thread)
        if (holds(threads[thread].loads, at, count))
            fail("%s overwrites bytes at %u that thread %zu has loaded, without fence_shared_async since",
                 what, at, thread);
}

}  // namespace emulation

// ---------------------------------------------------------------------------------------- what g++ calls
#define RK_HOOK extern "C" __attribute__((visibility("default"))) void
#define RK_HOOKS(bytes)                               \
    RK_HOOK __tsan_read##bytes(void* at) {            \
        emulation::see(at, bytes, false);             \
    }                                                 \
    RK_HOOK __tsan_write##bytes(void* at) {           \
        emulation::see(at, bytes, true);              \
    }                                                 \
    RK_HOOK __tsan_unaligned_read##bytes(void* at) {  \
        emulation::see(at, bytes, false);             \
    }                                                 \
    RK_HOOK __tsan_unaligned_write##bytes(void* at) { \
        emulation::see(at, bytes, true);              \
    }
RK_HOOKS(1)
RK_HOOKS(2)
RK_HOOKS(4)
RK_HOOKS(8)
RK_HOOKS(16)
RK_HOOK __tsan_read_range(void* at, size_t bytes) {
    emulation::see(at, bytes, false);
}
RK_HOOK __tsan_write_range(void* at, size_t bytes) {
    emulation::see(at, bytes, true);
}
RK_HOOK __tsan_init() {
    emulation::instrumented = true;
}
RK_HOOK __tsan_func_entry(void*) {}
RK_HOOK __tsan_func_exit() {}
RK_HOOK __tsan_vptr_update(void**, void*) {}
RK_HOOK __tsan_vptr_read(void**) {}
extern "C" __attribute__((visibility("default"))) uint8_t __tsan_atomic8_load(const volatile uint8_t* at,
                                                                              int) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);  // of function-local statics
}
