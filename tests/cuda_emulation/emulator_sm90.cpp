// What the functions of the emulation's ptx_sm90.cuh do: mbarrier, bulk tensor copies, the proxies of shared
// memory, setmaxnreg, wgmma.
#include <deque>
#include <map>
#include <ptx_sm90.cuh>
#include <vector>

namespace emulation {
namespace {

unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    if (address % alignment != 0)
        fail("%s: shared address %u is not a multiple of %u", what, address, alignment);
    if (address + uint64_t{bytes} > shared_bytes())
        fail("%s: shared address %u is out of bounds", what, address);
    return shared_memory() + address;
}

int thread_number() {
    const dim3 size = block_size();
    const uint3 thread = thread_index();
    return static_cast<int>(thread.x + size.x * (thread.y + size.y * thread.z));
}

int threads_of_block() {
    const dim3 size = block_size();
    return static_cast<int>(size.x * size.y * size.z);
}

// A state that begins anew in every block.
template <typename State>
State& of_block() {
    static State state;
    static uint64_t number = 0;
    if (number != block_number()) state = State{};
    number = block_number();
    return state;
}

// ------------------------------------------------------------------------------------------------ mbarrier

// 64 bits in shared memory, opaque to the kernel.
struct Mbarrier {
    uint16_t mark;              // tells an initialised one
    uint16_t over;              // phases, so far
    int16_t arrivals, pending;  // of a phase; of the current one, still to come
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier");
constexpr uint16_t kMbarrier = 0xb5b5;

// What does not fit beside that.
struct MbarrierState {
    int64_t expected_bytes;
    int initialised_by;  // thread
    bool announced;      // to the copy engine
};
struct Mbarriers {
    std::map<uint32_t, MbarrierState> at;
};

Mbarrier read_mbarrier(uint32_t address) {
    Mbarrier barrier;
    std::memcpy(&barrier, shared_at(address, 8, 8, "mbarrier"), 8);
    if (barrier.mark != kMbarrier) fail("mbarrier at %u was not initialised", address);
    return barrier;
}

// ------------------------------------------------------------------------------------------------ registers

// Registers of each thread, by warp, and those that no warp has. PTX ISA 9.7.19.5.
struct Registers {
    std::vector<int> of_warp;
    int left = 0;
};

Registers& registers() {
    Registers& all = of_block<Registers>();
    if (all.of_warp.empty()) {
        // What __launch_bounds__(threads, 1) lets the compiler take: the most that a multiprocessor has for
        // each thread, in eights.
        const int threads = threads_of_block();
        all.of_warp.assign(static_cast<size_t>((threads + 31) / 32), std::min(65536 / threads / 8 * 8, 248));
    }
    return all;
}

// ------------------------------------------------------------------------------------------------ wgmma

struct WgmmaOperation {
    WgmmaCall lanes[32];
    uint32_t a[32][4];        // as they were at the issue
    std::vector<uint16_t> b;  // [16, columns], likewise
};

struct Accumulators {
    float values[32][128];
    int operations = 0;  // under way
};

struct WgmmaWarp {
    bool fenced = false;
    std::vector<WgmmaOperation> open;
    std::deque<std::vector<WgmmaOperation>> groups;
    std::map<float*, Accumulators> accumulators;  // under way, by those of lane 0
    uint64_t issued = 0;
};

// calls: what all warps of a warpgroup must agree on, by number of the operation.
struct WgmmaState {
    WgmmaWarp warps[32];
    std::vector<WgmmaCall> calls[8];
};

WgmmaWarp& wgmma_warp() {
    return of_block<WgmmaState>().warps[thread_number() / 32];
}

// Element (k, n) of the matrix that a descriptor tells: PTX ISA 9.7.15.5.1.2, "Strides" and "Matrix
// Descriptor Format"; the canonical layouts, in units of 16 bytes, stand in mma_traits_sm90_gmma.hpp at
// make_gmma_desc.
struct MatrixAt {
    uint32_t start, leading, stride, span;
    bool inner;

    MatrixAt(uint64_t descriptor, bool columns_inner) : inner(columns_inner) {
        const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
        start = field(0), leading = field(16), stride = field(32);
        static const uint32_t spans[4] = {16, 128, 64, 32};  // bytes, by the swizzle mode in bits 62 and 63
        span = spans[descriptor >> 62];
        if (descriptor >> 49 & 7) fail("wgmma: a base offset, which the emulation does not know");
        // "Base offset": zero where the pattern of 8 rows repeats at its natural boundary. Steps along the
        // first row stay within it.
        if (span > 16 && start % (8 * span) >= span)
            fail(
                "wgmma: the matrix at %u begins within the pattern of its %u-byte swizzle, with base offset "
                "0",
                start, span);
    }

    uint32_t element(int k, int n) const {
        const uint32_t un = static_cast<uint32_t>(n), uk = static_cast<uint32_t>(k);
        uint32_t address = start;
        if (inner) {
            // Rows of `span` bytes hold neighbours in n; 8 rows, one for each k, make an atom.
            const uint32_t row = span / 2;
            address += un % row * 2 + uk % 8 * span;
            address +=
                span == 16 ? un / row * stride + uk / 8 * leading : un / row * leading + uk / 8 * stride;
        } else {
            // Rows of `span` bytes hold neighbours in k; 8 rows, one for each n, make an atom.
            address += un % 8 * span + un / 8 * stride + uk % 8 * 2;
            address += span == 16 ? uk / 8 * leading : uk / 8 * 16;
        }
        // The swizzle permutes 16-byte units by address bits 7 to 9: as many as there are units in a span.
        return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
    }
};

std::vector<uint16_t> read_matrix(const WgmmaCall& call) {
    std::vector<uint16_t> b(static_cast<size_t>(16 * call.columns));
    const MatrixAt matrix(call.b, call.inner);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < call.columns; ++n) {
            const uint32_t address = matrix.element(k, n);
            std::memcpy(&b[static_cast<size_t>(k * call.columns + n)], shared_at(address, 2, 2, "wgmma"), 2);
            demand_fenced_stores("wgmma", address, 2);
        }
    return b;
}

float half_to_float(uint16_t bits, bool bf16) {
    if (bf16) return emulation_bits<float>(static_cast<uint32_t>(bits) << 16);
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
}

bool in_flight(const float& x) {
    return emulation_bits<uint32_t>(x) == kInFlight;
}

void issue_wgmma(const void* const in[32], void* const[32], uint32_t mask) {
    if (mask != 0xffffffffu) fail("wgmma by a part of a warp");
    WgmmaWarp& warp = wgmma_warp();
    if (!warp.fenced) fail("wgmma without wgmma_fence since the last wait");
    WgmmaOperation operation;
    for (int lane = 0; lane < 32; ++lane) {
        operation.lanes[lane] = *static_cast<const WgmmaCall*>(in[lane]);
        std::memcpy(operation.a[lane], operation.lanes[lane].a, 16);
    }
    const WgmmaCall& call = operation.lanes[0];
    const auto same = [](const WgmmaCall& x, const WgmmaCall& y) {
        return x.b == y.b && x.columns == y.columns && x.accumulate == y.accumulate && x.inner == y.inner &&
               x.bf16 == y.bf16;
    };
    for (const WgmmaCall& other : operation.lanes)
        if (!same(call, other)) fail("wgmma: lanes of a warp disagree");
    auto& calls = of_block<WgmmaState>().calls[thread_number() / 128];
    if (warp.issued == calls.size()) calls.push_back(call);
    if (!same(call, calls[warp.issued++])) fail("wgmma: warps of a warpgroup disagree");
    operation.b = read_matrix(call);
    count(Count::tensor_flops, 2 * 16 * 16 * call.columns);
    if (thread_number() / 32 % 4 == 0) count(Count::bulk_wavefronts, 16 * 2 * call.columns / 128);

    const auto found = warp.accumulators.find(call.d);
    Accumulators& accumulators = warp.accumulators[call.d];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < call.columns / 2; ++i) {
            float& d = operation.lanes[lane].d[i];
            if (found != warp.accumulators.end()) {
                if (!in_flight(d)) fail("wgmma: an accumulator was written while wgmma is under way");
                continue;
            }
            accumulators.values[lane][i] = d;
            std::memcpy(&d, &kInFlight, 4);
        }
    accumulators.operations += 1;
    warp.open.push_back(std::move(operation));
}

void finish_wgmma(WgmmaWarp& warp, const WgmmaOperation& operation) {
    const WgmmaCall& call = operation.lanes[0];
    if (read_matrix(call) != operation.b) fail("wgmma: its shared memory was written while it was under way");
    Accumulators& accumulators = warp.accumulators.at(call.d);
    // Fragments: PTX ISA 9.7.15.5.1.1, "Register Fragments", for .m64nNk16. Here of one warp's 16 rows.
    float a[16][16];
    for (int lane = 0; lane < 32; ++lane) {
        if (std::memcmp(operation.a[lane], operation.lanes[lane].a, 16) != 0)
            fail("wgmma: registers of a were written while it was under way");
        for (int i = 0; i < 8; ++i)
            a[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + lane % 4 * 2 + i % 2] =
                half_to_float(static_cast<uint16_t>(operation.a[lane][i / 2] >> 16 * (i % 2)), call.bf16);
    }
    std::vector<float> b(operation.b.size());
    for (size_t i = 0; i < b.size(); ++i) b[i] = half_to_float(operation.b[i], call.bf16);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < call.columns / 2; ++i) {
            const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
            float& d = accumulators.values[lane][i];
            double sum = call.accumulate ? d : 0.0;
            for (int k = 0; k < 16; ++k)
                sum += double{a[row][k]} * b[static_cast<size_t>(k * call.columns + column)];
            d = static_cast<float>(sum);
        }
    if (--accumulators.operations > 0) return;
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < call.columns / 2; ++i) {
            float& d = operation.lanes[lane].d[i];
            if (!in_flight(d)) fail("wgmma: an accumulator was written while wgmma is under way");
            d = accumulators.values[lane][i];
        }
    warp.accumulators.erase(call.d);
}

void wait_wgmma(const void* const in[32], void* const[32], uint32_t) {
    WgmmaWarp& warp = wgmma_warp();
    const size_t pending = static_cast<size_t>(*static_cast<const int*>(in[0]));
    if (!warp.open.empty()) fail("wgmma_wait before wgmma_commit");
    while (warp.groups.size() > pending) {
        for (const WgmmaOperation& operation : warp.groups.front()) finish_wgmma(warp, operation);
        warp.groups.pop_front();
    }
    warp.fenced = false;
}

}  // namespace

void mbarrier_init(uint32_t barrier, int arrivals) {
    if (arrivals < 1 || arrivals > 1024) fail("mbarrier_init: %d arrivals", arrivals);
    const auto count = static_cast<int16_t>(arrivals);
    const Mbarrier fresh{kMbarrier, 0, count, count};
    std::memcpy(shared_at(barrier, 8, 8, "mbarrier_init"), &fresh, 8);
    of_block<Mbarriers>().at[barrier] = {0, thread_number(), false};
}

void fence_mbarrier_init() {
    for (auto& [address, barrier] : of_block<Mbarriers>().at)
        if (barrier.initialised_by == thread_number()) barrier.announced = true;
}

void change_mbarrier(uint32_t address, int arrivals, int64_t more_bytes) {
    Mbarrier barrier = read_mbarrier(address);
    if (arrivals < 0 || arrivals > barrier.pending)
        fail("mbarrier at %u: %d arrivals, and only %d are to come", address, arrivals, barrier.pending);
    barrier.pending = static_cast<int16_t>(barrier.pending - arrivals);
    int64_t& bytes = of_block<Mbarriers>().at[address].expected_bytes;
    bytes += more_bytes;
    if (bytes < -(1 << 20) + 1 || bytes > (1 << 20) - 1)
        fail("mbarrier at %u: transaction count %lld", address, static_cast<long long>(bytes));
    if (barrier.pending == 0 && bytes == 0) {
        barrier.over = static_cast<uint16_t>(barrier.over + 1);
        barrier.pending = barrier.arrivals;
    }
    std::memcpy(shared_at(address, 8, 8, "mbarrier"), &barrier, 8);
    unpark();
}

void mbarrier_wait(uint32_t barrier, int phase) {
    count(Count::mbarrier_waits);
    yield();
    for (;;) {
        // Parity tells a phase from the one before and the one after, and no more: who is further ahead goes
        // on too early, who is further behind too late.
        const auto after = static_cast<uint16_t>(read_mbarrier(barrier).over - phase);
        if (after == 1) return;
        if (after != 0)
            fail(
                "mbarrier_wait for phase %d of the barrier at %u, of which phase %d is under way: by its "
                "parity it %s",
                phase, barrier, phase + static_cast<int16_t>(after),
                after % 2 == 1 ? "passes at once" : "waits for the end of another");
        park("mbarrier_wait");
    }
}

namespace {

EncodedMap decode(const CUtensorMap* map, const char* what) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
        fail("%s: the tensor map is not aligned to 64 bytes", what);
    if (!is_parameter(map, sizeof(*map)))
        fail("%s: the tensor map is not in parameter space: no argument of the kernel holds it", what);
    EncodedMap encoded;
    std::memcpy(&encoded, map, sizeof(encoded));
    return encoded;
}

}  // namespace

void prefetch_map(const CUtensorMap* map) {
    (void)decode(map, "prefetch_tensor_map");
}

// The copy's sectors of global memory, and what it writes in shared memory.
static void count_box(const rk::cuda::TensorMap3d& t, int x, int y, int z) {
    count(Count::bulk_wavefronts, 2 * t.box[0] * t.box[1] * t.box[2] / 128);
    const auto end = std::min(t.sizes[0], static_cast<uint64_t>(x) + t.box[0]);
    for (uint32_t k = 0; k < t.box[2]; ++k)
        for (uint32_t j = 0; j < t.box[1]; ++j) {
            const uint64_t row = static_cast<uint64_t>(y) + j, plane = static_cast<uint64_t>(z) + k;
            if (row >= t.sizes[1] || plane >= t.sizes[2]) continue;
            const auto* const from = static_cast<const unsigned char*>(t.data) + 2 * static_cast<size_t>(x) +
                                     row * t.strides[0] + plane * t.strides[1];
            count_copy(from, 2 * (end - static_cast<uint64_t>(x)), false);
        }
}

void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
    const EncodedMap encoded = decode(map, "copy_box");
    if (encoded.mark != kTensorMap) fail("copy_box: not a tensor map");
    const rk::cuda::TensorMap3d& t = encoded.tensor;
    const uint32_t bytes = 2 * t.box[0] * t.box[1] * t.box[2];
    (void)shared_at(to, bytes, 128, "copy_box");
    (void)read_mbarrier(barrier);
    if (!of_block<Mbarriers>().at[barrier].announced)
        fail("copy_box: the copy engine does not know the barrier at %u: no fence_mbarrier_init", barrier);
    demand_fenced_loads("copy_box", to, bytes);
    demand_fenced_stores("copy_box", to, bytes);
    const std::vector<unsigned char> nothing(bytes, 0xff);
    write_async(to, nothing.data(), bytes);
    if (counting()) count_box(encoded.tensor, x, y, z);
    later([=] {
        const rk::cuda::TensorMap3d& tensor = encoded.tensor;
        uint32_t offset = to;
        for (uint32_t k = 0; k < tensor.box[2]; ++k)
            for (uint32_t j = 0; j < tensor.box[1]; ++j)
                for (uint32_t i = 0; i < tensor.box[0]; ++i, offset += 2) {
                    const int64_t at[3] = {int64_t{x} + i, int64_t{y} + j, int64_t{z} + k};
                    uint16_t value = 0;
                    bool inside = true;
                    for (int axis = 0; axis < 3; ++axis)
                        inside =
                            inside && at[axis] >= 0 && static_cast<uint64_t>(at[axis]) < tensor.sizes[axis];
                    if (inside)
                        std::memcpy(&value,
                                    static_cast<const unsigned char*>(tensor.data) + 2 * at[0] +
                                        at[1] * static_cast<int64_t>(tensor.strides[0]) +
                                        at[2] * static_cast<int64_t>(tensor.strides[1]),
                                    2);
                    // CUDA C++ Programming Guide, "TMA Swizzle Patterns": 16-byte units within the span are
                    // permuted by the number of the 128-byte line of shared memory (all of its low 3 bits for
                    // 128 bytes, 2 for 64).
                    const uint32_t units = static_cast<uint32_t>(encoded.swizzle_bytes) / 16;
                    const uint32_t line = offset / 128, unit = offset / 16 % units;
                    const uint32_t swizzled = offset - unit * 16 + (unit ^ line % units) * 16;
                    write_async(swizzled, &value, 2);
                }
        change_mbarrier(barrier, 0, -static_cast<int64_t>(bytes));
    });
}

void set_registers(int count, bool more) {
    const struct {
        int count;
        bool more;
    } mine{count, more};
    warp_collective("setmaxnreg", 0xffffffffu, &mine, nullptr,
                    [](const void* const[32], void* const[32], uint32_t) {});
    if (lane() == 0) {
        Registers& all = registers();
        int& of_warp = all.of_warp[static_cast<size_t>(thread_number() / 32)];
        if (more ? count < of_warp : count > of_warp)
            fail("setmaxnreg.%s to %d registers from %d", more ? "inc" : "dec", count, of_warp);
        while ((count - of_warp) * 32 > all.left) park("registers, of which the block has no more");
        all.left -= (count - of_warp) * 32;
        of_warp = count;
        if (!more) unpark();
    }
    __syncwarp();
}

void check_end_of_block() {
    const std::vector<int>& of_warp = of_block<Registers>().of_warp;
    for (size_t warp = 0; warp < of_warp.size(); ++warp)
        if (of_warp[warp] != of_warp[warp / 4 * 4])
            fail("setmaxnreg: warps of a warpgroup end with %d and %d registers", of_warp[warp / 4 * 4],
                 of_warp[warp]);
}

void wgmma_fence() {
    warp_collective("wgmma_fence", 0xffffffffu, nullptr, nullptr,
                    [](const void* const*, void* const*, uint32_t) { wgmma_warp().fenced = true; });
}

void wgmma(const WgmmaCall& call) {
    warp_collective("wgmma", 0xffffffffu, &call, nullptr, issue_wgmma);
}

void wgmma_commit() {
    warp_collective("wgmma_commit", 0xffffffffu, nullptr, nullptr,
                    [](const void* const*, void* const*, uint32_t) {
                        WgmmaWarp& warp = wgmma_warp();
                        warp.groups.push_back(std::move(warp.open));
                        warp.open.clear();
                    });
}

void wgmma_wait(int pending) {
    warp_collective("wgmma_wait", 0xffffffffu, &pending, nullptr, wait_wgmma);
}

}  // namespace emulation
