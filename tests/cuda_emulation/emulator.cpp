// The emulation's run time: a block's threads as fibers on one operating-system thread, run in random order;
// barriers and warp collectives as places where a fiber waits. README.md tells what it finds and what it
// cannot.
#include <pthread.h>
#include <sys/mman.h>

#include <cstdarg>
#include <deque>
#include <launch.cuh>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/asan_interface.h>
#    include <sanitizer/common_interface_defs.h>
#else
#    define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#    define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

// Stores the registers that a function must preserve on the running stack, its pointer in *from, and goes on
// where `to` was stored (System V ABI, x86-64). ucontext's swapcontext would do, with two system calls each
// time.
extern "C" void rk_emulation_switch(void** from, void* to);
asm(R"(
    .text
    .type rk_emulation_switch, @function
rk_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size rk_emulation_switch, . - rk_emulation_switch
)");

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 256 * 1024;
constexpr int kBarriers = 16;

// ---------------------------------------------------------------------------------------- settings, by the
// tests

struct Settings {
    rk::cuda::Device device{80, 4, 163 * 1024};
    bool dry_run = false;
    uint64_t seed = 1;
};
Settings settings;

size_t shared_bytes_of(int arch) {
    // CUDA C++ Programming Guide, technical specifications: maximum shared memory per thread block.
    switch (arch) {
        case 80:
        case 87:
            return 163 * 1024;
        case 86:
        case 89:
        case 120:
            return 99 * 1024;
        default:
            return arch >= 90 ? 227 * 1024 : 48 * 1024;
    }
}

struct Recorded {
    int64_t grid[3], block[3], shared_bytes;
};
std::vector<Recorded> launches;

// ---------------------------------------------------------------------------------------- fibers

struct Fiber {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;  // kGuardBytes that may not be touched, then kStackBytes
    void* fake_stack = nullptr;      // the address sanitizer's, while the fiber is not running
    uint3 thread{};
    bool live = false;
    const char* waits_for = nullptr;
    std::vector<std::function<void()>> pending;             // deferred since the last commit
    std::deque<std::vector<std::function<void()>>> groups;  // committed, oldest first
    std::vector<std::pair<const void*, size_t>> parameters;
};

struct WarpMeeting {
    const char* what = nullptr;  // null: nobody waits here
    uint32_t mask = 0, arrived = 0;
    const void* in[32];
    void* out[32];
};

struct Warp {
    // Lanes may wait in more than one place at a time (disjoint masks in divergent code).
    std::vector<WarpMeeting> meetings;
};

struct Barrier {
    int arrived = 0, expected = 0, predicates = 0, result = 0;
    std::vector<int> waiting;
};

struct Later {  // what the copy engine has yet to do, and when
    uint64_t due;
    std::function<void()> action;
};
constexpr uint64_t kHeld = UINT64_MAX;
struct FailedLater {};  // what fail() throws where no thread runs

struct Block {
    dim3 grid, size;
    uint3 index{};
    int threads = 0, live = 0;
    size_t shared_bytes = 0;
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    std::vector<int> runnable, parked;
    std::vector<Later> later;
    int until_held = 0;   // of those to come, how many are not held back
    uint64_t steps = 0;   // of the scheduler
    uint64_t number = 0;  // counts all blocks that ever ran
    int running = -1;
    bool failed = false;
    std::string message;
    const std::function<void()>* kernel = nullptr;
};

std::vector<std::unique_ptr<Fiber>> fibers;
void* scheduler_stack_pointer = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif
Block block;
alignas(1024) unsigned char shared[kMostShared];
std::mt19937_64 random_order;

// Of the thread that launches: what a kernel finds there are its arguments.
const unsigned char *host_stack = nullptr, *host_stack_end = nullptr;
void find_host_stack() {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
    host_stack = static_cast<const unsigned char*>(begin);
    host_stack_end = host_stack + bytes;
}

Fiber& current() {
    return *fibers[static_cast<size_t>(block.running)];
}

void to_scheduler(bool last) {
    Fiber& fiber = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, scheduler_stack,
                                   scheduler_stack_bytes);
#endif
    (void)last;
    rk_emulation_switch(&fiber.stack_pointer, scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void wait(const char* what) {
    current().waits_for = what;
    to_scheduler(false);
}

void wake(int thread) {
    fibers[static_cast<size_t>(thread)]->waits_for = nullptr;
    block.runnable.push_back(thread);
}

void complete(Barrier& barrier) {
    barrier.result = barrier.predicates;
    for (const int thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
    barrier.arrived = barrier.expected = barrier.predicates = 0;
}

void arrive(int id, int count, int predicate) {
    if (id < 0 || id >= kBarriers) fail("barrier %d: there are %d", id, kBarriers);
    if (count % 32 != 0)
        fail("barrier %d waits for %d threads, which is not a multiple of the warp", id, count);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived > 0 && barrier.expected != count)
        fail("barrier %d: one thread waits for %d threads, another for %d", id, barrier.expected, count);
    barrier.expected = count;
    barrier.arrived += 1;
    barrier.predicates += predicate != 0;
    count_barrier(block.running);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*block.kernel)();
    Fiber& fiber = current();
    const bool unwaited =
        std::any_of(fiber.groups.begin(), fiber.groups.end(), [](const auto& g) { return !g.empty(); });
    if (unwaited || !fiber.pending.empty())
        fail("the thread ends with asynchronous copies that it never waited for");
    fiber.live = false;
    block.live -= 1;
    Barrier& barrier = block.barriers[0];  // __syncthreads waits for the threads that live
    if (block.live > 0 && barrier.arrived == block.live && barrier.expected == 0) complete(barrier);
    to_scheduler(true);
}

void prepare(int thread) {
    while (fibers.size() <= static_cast<size_t>(thread)) fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers[static_cast<size_t>(thread)];
    if (fiber.stack == nullptr) {
        void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for the stack of a thread");
        fiber.stack = static_cast<unsigned char*>(memory);
        mprotect(fiber.stack, kGuardBytes, PROT_NONE);
    }
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack + kGuardBytes, kStackBytes);  // frames of a launch that failed
    // What rk_emulation_switch pops: six registers, then where to go; above it, the return address that
    // nobody uses.
    void** top = reinterpret_cast<void**>(fiber.stack + kGuardBytes + kStackBytes) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = top;
    fiber.fake_stack = nullptr;
    const unsigned t = static_cast<unsigned>(thread);
    fiber.thread =
        make_uint3(t % block.size.x, t / block.size.x % block.size.y, t / (block.size.x * block.size.y));
    fiber.live = true;
    fiber.waits_for = nullptr;
    fiber.pending.clear();
    fiber.groups.clear();
    fiber.parameters.clear();
}

// One of the next 128, the first ones more likely.
int draw_held() {
    return static_cast<int>(random_order() % (uint64_t{1} << random_order() % 8));
}

void resume(int thread) {
    Fiber& fiber = *fibers[static_cast<size_t>(thread)];
    block.running = thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack + kGuardBytes, kStackBytes);
#endif
    rk_emulation_switch(&scheduler_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    block.running = -1;
}

void run_block() {
    std::memset(shared, 0xff, block.shared_bytes);  // NaN, in every float format
    ASAN_POISON_MEMORY_REGION(shared + block.shared_bytes, kMostShared - block.shared_bytes);
    block.live = block.threads;
    block.warps.assign(static_cast<size_t>((block.threads + 31) / 32), Warp{});
    for (Barrier& barrier : block.barriers) barrier = Barrier{};
    block.runnable.clear();
    block.parked.clear();
    block.later.clear();
    block.until_held = draw_held();
    block.number += 1;
    begin_proxies(block.threads);
    begin_counts_of_block(block.threads);
    for (int thread = 0; thread < block.threads; ++thread) {
        prepare(thread);
        block.runnable.push_back(thread);
    }
    while (!(block.runnable.empty() && block.later.empty()) && !block.failed) {
        block.steps += 1;
        const auto next = std::min_element(block.later.begin(), block.later.end(),
                                           [](const Later& a, const Later& b) { return a.due < b.due; });
        if (next != block.later.end() && (block.runnable.empty() || next->due <= block.steps)) {
            const std::function<void()> action = std::move(next->action);
            if (next->due == kHeld) block.until_held = draw_held();
            block.later.erase(next);
            try {
                action();
            } catch (const FailedLater&) {  // no thread to blame: block.message tells it
            }
            if (block.live == 0 && !block.failed) {
                block.failed = true;
                block.message = "the block ends while the copy engine is at work in its shared memory";
            }
            continue;
        }
        const size_t i = random_order() % block.runnable.size();
        const int thread = block.runnable[i];
        block.runnable[i] = block.runnable.back();
        block.runnable.pop_back();
        resume(thread);
    }
    ASAN_UNPOISON_MEMORY_REGION(shared, kMostShared);
    end_counts_of_block();
    if (block.live == 0 && !block.failed) {
        try {
            check_end_of_block();
        } catch (const FailedLater&) {
        }
    }
    if (block.failed || block.live == 0) return;
    block.failed = true;
    block.message = "the block hangs: every thread waits.";
    std::map<std::string, std::pair<int, int>> waiting;  // for what: how many threads, the first of them
    for (int thread = block.threads - 1; thread >= 0; --thread) {
        const Fiber& fiber = *fibers[static_cast<size_t>(thread)];
        if (!fiber.live) continue;
        auto& [count, first] = waiting[fiber.waits_for];
        count += 1;
        first = thread;
    }
    for (const auto& [what, who] : waiting)
        block.message += " " + std::to_string(who.first) + " of them for " + what + ", thread " +
                         std::to_string(who.second) + " among them.";
}

std::string place() {
    std::string text = "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) +
                       ", " + std::to_string(block.index.z) + ")";
    return text + ", RK_EMULATION_SEED=" + std::to_string(settings.seed);
}

}  // namespace

bool is_dry_run() {
    return settings.dry_run;
}

uint3 thread_index() {
    return current().thread;
}
uint3 block_index() {
    return block.index;
}
dim3 block_size() {
    return block.size;
}
dim3 grid_size() {
    return block.grid;
}
int lane() {
    return block.running % 32;
}
unsigned char* shared_memory() {
    return shared;
}
size_t shared_bytes() {
    return block.shared_bytes;
}

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    block.failed = true;
    block.message = text;
    if (block.running >= 0) {
        block.message += " (thread " + std::to_string(block.running) + ")";
        to_scheduler(true);  // and never back
    }
    throw FailedLater{};
}

void yield() {
    block.runnable.push_back(block.running);
    to_scheduler(false);
}

void warp_collective(const char* what, uint32_t mask, const void* in, void* out, WarpFunction compute) {
    const int mine = lane(), first = block.running - mine;
    if (!(mask >> mine & 1)) fail("%s: the mask 0x%08x leaves out the lane that calls, %d", what, mask, mine);
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        if (first + i >= block.threads)
            fail("%s: the mask 0x%08x names lane %d, which does not exist", what, mask, i);
        if (!fibers[static_cast<size_t>(first + i)]->live)
            fail("%s: the mask 0x%08x names lane %d, which has ended", what, mask, i);
    }
    auto& meetings = block.warps[static_cast<size_t>(first / 32)].meetings;
    size_t at = 0;
    while (at < meetings.size() && !(meetings[at].mask & mask)) ++at;
    if (at == meetings.size()) {
        meetings.emplace_back();
        meetings.back().what = what;
        meetings.back().mask = mask;
    }
    WarpMeeting& meeting = meetings[at];
    if (meeting.mask != mask || std::strcmp(meeting.what, what) != 0)
        fail("lanes of a warp diverge: one is at %s with mask 0x%08x, another at %s with mask 0x%08x",
             meeting.what, meeting.mask, what, mask);
    meeting.in[mine] = in;
    meeting.out[mine] = out;
    meeting.arrived |= 1u << mine;
    if (meeting.arrived != mask) {
        wait(what);
        return;
    }
    compute(meeting.in, meeting.out, mask);
    if (mask == 0xffffffffu) count_meeting(first / 32);
    for (int i = 0; i < 32; ++i)
        if (i != mine && mask >> i & 1) wake(first + i);
    meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(at));
}

int block_barrier(int id, int count, int predicate) {
    arrive(id, count, predicate);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived == (count == 0 ? block.live : count)) {
        complete(barrier);
    } else {
        barrier.waiting.push_back(block.running);
        wait(id == 0 ? "__syncthreads" : "a named barrier");
    }
    return barrier.result;
}

void block_barrier_arrive(int id, int count) {
    arrive(id, count, 0);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived == count) complete(barrier);
}

uint64_t block_number() {
    return block.number;
}

int running_thread() {
    return block.running;
}

void note_parameter(const void* address, size_t bytes) {
    current().parameters.emplace_back(address, bytes);
}

bool is_parameter(const void* address, size_t bytes) {
    const auto* const at = static_cast<const unsigned char*>(address);
    for (const auto& [begin, size] : current().parameters) {
        const auto* const from = static_cast<const unsigned char*>(begin);
        if (at >= from && at + bytes <= from + size) return true;
    }
    return false;
}

void park(const char* what) {
    block.parked.push_back(block.running);
    wait(what);
}

void unpark() {
    for (const int thread : block.parked) wake(thread);
    block.parked.clear();
}

void later(std::function<void()> action) {
    // At once or after many threads' turns, and anything between.
    const uint64_t delay = random_order() % (uint64_t{1} << random_order() % 15);
    const bool held = block.until_held-- == 0;
    block.later.push_back({held ? kHeld : block.steps + delay, std::move(action)});
}

void defer(std::function<void()> action) {
    current().pending.push_back(std::move(action));
}

void commit_group() {
    current().groups.push_back(std::move(current().pending));
    current().pending.clear();
}

void wait_group(int pending) {
    auto& groups = current().groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        for (const auto& action : groups.front()) action();
        groups.pop_front();
    }
}

bool in_running_stack(const void* address, size_t bytes) {
    const auto* const at = static_cast<const unsigned char*>(address);
    const unsigned char* const begin = current().stack + kGuardBytes;
    return at >= begin && at + bytes <= begin + kStackBytes;
}

bool in_a_stack(const void* address) {
    if (block.running >= 0 && in_running_stack(address, 1)) return true;
    const auto* const at = static_cast<const unsigned char*>(address);
    if (at >= host_stack && at < host_stack_end) return true;
    return std::any_of(fibers.begin(), fibers.end(), [&](const auto& fiber) {
        return at >= fiber->stack && at < fiber->stack + kGuardBytes + kStackBytes;
    });
}

void run(dim3 grid, dim3 size, size_t bytes, const void* code, const std::function<void()>& kernel) {
    const auto refuse = [](const std::string& why) { throw std::runtime_error("emulation: " + why); };
    if (block.running >= 0) refuse("a kernel launches a kernel");
    if (grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535)
        refuse("grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
               std::to_string(grid.z) + " blocks is larger than CUDA allows");
    const uint64_t threads = static_cast<uint64_t>(size.x) * size.y * size.z;
    if (threads == 0 || threads > kMostThreads || size.z > 64)
        refuse("block of " + std::to_string(threads) + " threads");
    if (bytes > settings.device.shared_bytes_per_block)
        refuse(std::to_string(bytes) + " bytes of shared memory; sm_" + std::to_string(settings.device.arch) +
               " has " + std::to_string(settings.device.shared_bytes_per_block));
    launches.push_back({{grid.x, grid.y, grid.z}, {size.x, size.y, size.z}, static_cast<int64_t>(bytes)});
    if (settings.dry_run) return;
    find_host_stack();
    begin_counts(code);

    block.grid = grid;
    block.size = size;
    block.threads = static_cast<int>(threads);
    block.shared_bytes = bytes;
    block.kernel = &kernel;
    block.failed = false;
    random_order.seed(settings.seed + launches.size());
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    // Blocks in any order: a step that has no divisor in common with their number visits each once.
    uint64_t step = random_order() % blocks + 1;
    const auto gcd = [](uint64_t a, uint64_t b) {
        while (b != 0) {
            const uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        return a;
    };
    while (gcd(step, blocks) != 1) ++step;
    uint64_t at = random_order() % blocks;
    for (uint64_t i = 0; i < blocks; ++i, at = (at + step) % blocks) {
        block.index =
            make_uint3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                       static_cast<unsigned>(at / (static_cast<uint64_t>(grid.x) * grid.y)));
        run_block();
        if (block.failed) refuse(block.message + " [" + place() + "]");
    }
}

}  // namespace emulation

const rk::cuda::Device& rk::cuda::current_device() {
    return emulation::settings.device;
}

// ---------------------------------------------------------------------------------------- for the tests, by
// ctypes

extern "C" {

// arch: 80, 86, ...; its shared memory follows. multiprocessors: what a persistent grid is planned from.
__attribute__((visibility("default"))) void rk_emulation_set_device(int arch, int multiprocessors) {
    emulation::settings.device = {arch, multiprocessors, emulation::shared_bytes_of(arch)};
}

// With 1, launches are checked and recorded, and no kernel runs.
__attribute__((visibility("default"))) void rk_emulation_set_dry_run(int on) {
    emulation::settings.dry_run = on != 0;
}

// Of the order in which threads and blocks run.
__attribute__((visibility("default"))) void rk_emulation_set_seed(uint64_t seed) {
    emulation::settings.seed = seed;
}

// Copies the launches since the last call, 7 numbers each (grid, block, shared bytes), oldest first, at most
// `room` of them, and forgets them all; returns how many there were.
__attribute__((visibility("default"))) int64_t rk_emulation_take_launches(int64_t* to, int64_t room) {
    const int64_t count = static_cast<int64_t>(emulation::launches.size());
    for (int64_t i = 0; i < std::min(count, room); ++i)
        std::memcpy(to + 7 * i, &emulation::launches[static_cast<size_t>(i)], 7 * sizeof(int64_t));
    emulation::launches.clear();
    return count;
}
}
