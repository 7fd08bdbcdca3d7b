// The emulation's csrc/cuda/ptx_sm90.cuh: the same functions in software, written from the PTX ISA (9.7.15
// wgmma, 9.7.13.15 mbarrier, 9.7.9.27 cp.async.bulk.tensor) and from what CuTe's mma_traits_sm90_gmma.hpp
// says of canonical layouts.
//
// Addresses in the shared window are offsets from the start of the block's dynamic shared memory.
//
// Asynchrony shows. A copy fills its destination with NaN at once and writes it at some later time, in any
// order among copies. The accumulators of a wgmma hold a pattern from its issue to the wait, where it is
// computed; a kernel that writes them, the registers of a, or the shared memory of b in between is told so,
// and so is one without the fence or with warps that disagree. Not seen: a missing fence_shared_async, and a
// missing fence_mbarrier_init.
#pragma once
#include <cuda.h>

#include <deque>
#include <map>
#include <tensor_map.cuh>
#include <vector>

namespace emulation {

inline unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    if (address % alignment != 0)
        fail("%s: shared address %u is not a multiple of %u", what, address, alignment);
    if (address + uint64_t{bytes} > shared_bytes())
        fail("%s: shared address %u is out of bounds", what, address);
    return shared_memory() + address;
}

// ------------------------------------------------------------------------------------------------ mbarrier

// 64 bits in shared memory, opaque to the kernel.
struct Mbarrier {
    uint16_t mark;  // tells an initialised one
    uint8_t phase;  // parity of the current phase
    uint8_t unused;
    int16_t arrivals, pending;  // of a phase; of the current one, still to come
};
// The transaction count does not fit beside that; it lives here, by address.
inline std::map<uint32_t, int64_t>& expected_bytes() {
    static std::map<uint32_t, int64_t> bytes;
    static uint64_t of_block = 0;
    if (of_block != block_number()) bytes.clear();
    of_block = block_number();
    return bytes;
}

inline Mbarrier read_mbarrier(uint32_t address) {
    Mbarrier barrier;
    std::memcpy(&barrier, shared_at(address, 8, 8, "mbarrier"), 8);
    if (barrier.mark != 0xb5b5) fail("mbarrier at %u was not initialised", address);
    return barrier;
}

inline void change_mbarrier(uint32_t address, int arrivals, int64_t more_bytes) {
    Mbarrier barrier = read_mbarrier(address);
    if (arrivals < 0 || arrivals > barrier.pending)
        fail("mbarrier at %u: %d arrivals, and only %d are to come", address, arrivals, barrier.pending);
    barrier.pending = static_cast<int16_t>(barrier.pending - arrivals);
    int64_t& bytes = expected_bytes()[address];
    bytes += more_bytes;
    if (bytes < -(1 << 20) + 1 || bytes > (1 << 20) - 1)
        fail("mbarrier at %u: transaction count %lld", address, static_cast<long long>(bytes));
    if (barrier.pending == 0 && bytes == 0) {
        barrier.phase ^= 1;
        barrier.pending = barrier.arrivals;
    }
    std::memcpy(shared_at(address, 8, 8, "mbarrier"), &barrier, 8);
    unpark();
}

// ------------------------------------------------------------------------------------------------ wgmma

constexpr uint32_t kInFlight = 0x7fc0f117;  // a NaN

struct WgmmaCall {  // of one lane
    float* d;
    const uint32_t* a;
    uint64_t b;
    int columns;
    bool accumulate, inner, bf16;
};

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
    uint64_t of_block = 0;
    bool fenced = false;
    std::vector<WgmmaOperation> open;
    std::deque<std::vector<WgmmaOperation>> groups;
    std::map<float*, Accumulators> accumulators;  // under way, by those of lane 0
    uint64_t issued = 0;
};

// What all warps of a warpgroup must agree on, by number of the operation.
struct WgmmaWarpgroup {
    uint64_t of_block = 0;
    std::vector<WgmmaCall> calls;
};

inline int warp_index() {
    const dim3& size = block_size();
    const uint3& thread = thread_index();
    return static_cast<int>((thread.x + size.x * (thread.y + size.y * thread.z)) / 32);
}

inline WgmmaWarp& wgmma_warp() {
    static WgmmaWarp warps[32];
    WgmmaWarp& warp = warps[warp_index()];
    if (warp.of_block != block_number()) {
        warp = WgmmaWarp{};
        warp.of_block = block_number();
    }
    return warp;
}

inline WgmmaWarpgroup& wgmma_warpgroup() {
    static WgmmaWarpgroup groups[8];
    WgmmaWarpgroup& group = groups[warp_index() / 4];
    if (group.of_block != block_number()) {
        group = WgmmaWarpgroup{};
        group.of_block = block_number();
    }
    return group;
}

// Element (k, n) of the matrix that a descriptor tells: PTX ISA 9.7.15.5.1.2, "Strides" and "Matrix
// Descriptor Format"; the canonical layouts, in units of 16 bytes, stand in mma_traits_sm90_gmma.hpp at
// make_gmma_desc.
inline uint32_t matrix_element(uint64_t descriptor, bool inner, int k, int n) {
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 49 & 7) fail("wgmma: a base offset, which the emulation does not know");
    const uint32_t un = static_cast<uint32_t>(n), uk = static_cast<uint32_t>(k);
    static const uint32_t spans[4] = {16, 128, 64, 32};  // bytes, by the swizzle mode in bits 62 and 63
    const uint32_t span = spans[descriptor >> 62];
    uint32_t address = start;
    if (inner) {
        // Rows of `span` bytes hold neighbours in n; 8 rows, one for each k, make an atom.
        const uint32_t row = span / 2;
        address += un % row * 2 + uk % 8 * span;
        address += span == 16 ? un / row * stride + uk / 8 * leading : un / row * leading + uk / 8 * stride;
    } else {
        // Rows of `span` bytes hold neighbours in k; 8 rows, one for each n, make an atom.
        address += un % 8 * span + un / 8 * stride + uk % 8 * 2;
        address += span == 16 ? uk / 8 * leading : uk / 8 * 16;
    }
    // The swizzle permutes 16-byte units by address bits 7 to 9: as many as there are units in a span.
    return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}

inline std::vector<uint16_t> read_matrix(const WgmmaCall& call) {
    std::vector<uint16_t> b(static_cast<size_t>(16 * call.columns));
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < call.columns; ++n)
            std::memcpy(&b[static_cast<size_t>(k * call.columns + n)],
                        shared_at(matrix_element(call.b, call.inner, k, n), 2, 2, "wgmma"), 2);
    return b;
}

inline float half_to_float(uint16_t bits, bool bf16) {
    if (bf16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
}

inline bool in_flight(const float& x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits == kInFlight;
}

inline void demand_complete(const float& result) {
    if (in_flight(result)) fail("wgmma_wait: a result that it names is still under way");
}
template <typename T, size_t N>
void demand_complete(const T (&results)[N]) {
    for (const T& result : results) demand_complete(result);
}

inline void issue_wgmma(const void* const in[32], void* const[32], uint32_t mask) {
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
    auto& calls = wgmma_warpgroup().calls;
    if (warp.issued == calls.size()) calls.push_back(call);
    if (!same(call, calls[warp.issued++])) fail("wgmma: warps of a warpgroup disagree");
    operation.b = read_matrix(call);

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

inline void finish_wgmma(WgmmaWarp& warp, const WgmmaOperation& operation) {
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

inline void wait_wgmma(const void* const in[32], void* const[32], uint32_t) {
    WgmmaWarp& warp = wgmma_warp();
    const size_t pending = static_cast<size_t>(*static_cast<const int*>(in[0]));
    if (!warp.open.empty()) fail("wgmma_wait before wgmma_commit");
    while (warp.groups.size() > pending) {
        for (const WgmmaOperation& operation : warp.groups.front()) finish_wgmma(warp, operation);
        warp.groups.pop_front();
    }
    warp.fenced = false;
}

}  // namespace emulation

namespace rk::cuda::ptx {

inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - ::emulation::shared_memory());
}

inline void mbarrier_init(uint32_t barrier, int arrivals) {
    if (arrivals < 1 || arrivals > 1024) ::emulation::fail("mbarrier_init: %d arrivals", arrivals);
    const auto count = static_cast<int16_t>(arrivals);
    const ::emulation::Mbarrier fresh{0xb5b5, 0, 0, count, count};
    static_assert(sizeof(fresh) == 8, "an mbarrier");
    std::memcpy(::emulation::shared_at(barrier, 8, 8, "mbarrier_init"), &fresh, 8);
    ::emulation::expected_bytes()[barrier] = 0;
}

inline void fence_mbarrier_init() {}

inline void mbarrier_arrive(uint32_t barrier, int count = 1) {
    if (count < 1) ::emulation::fail("mbarrier_arrive: count %d", count);
    ::emulation::change_mbarrier(barrier, count, 0);
}

inline void mbarrier_arrive_expect_bytes(uint32_t barrier, int bytes) {
    ::emulation::change_mbarrier(barrier, 0, bytes);  // expect-tx comes before the arrival
    ::emulation::change_mbarrier(barrier, 1, 0);
}

// The phase of that parity is over when the current one has the other parity.
inline void mbarrier_wait(uint32_t barrier, int parity) {
    if (parity != 0 && parity != 1) ::emulation::fail("mbarrier_wait: parity %d", parity);
    ::emulation::yield();
    while (::emulation::read_mbarrier(barrier).phase == parity) ::emulation::park("mbarrier_wait");
}

inline void prefetch_tensor_map(const CUtensorMap*) {}

inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
    using namespace ::emulation;
    EncodedMap encoded;
    std::memcpy(&encoded, map, sizeof(encoded));
    if (encoded.mark != kTensorMap) fail("copy_box: not a tensor map");
    const TensorMap3d& t = encoded.tensor;
    const uint32_t bytes = 2 * t.box[0] * t.box[1] * t.box[2];
    std::memset(shared_at(to, bytes, 128, "copy_box"), 0xff, bytes);
    (void)read_mbarrier(barrier);
    later([=] {
        const TensorMap3d& tensor = encoded.tensor;
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
                    std::memcpy(shared_at(swizzled, 2, 2, "copy_box"), &value, 2);
                }
        change_mbarrier(barrier, 0, -static_cast<int64_t>(bytes));
    });
}

inline void fence_shared_async() {}

inline void named_barrier(int id, int threads) {
    ::emulation::block_barrier(id, threads, 0);
}

template <int Registers>
inline void take_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "setmaxnreg");
}
template <int Registers>
inline void give_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "setmaxnreg");
}

template <typename... Registers>
inline void wgmma_fence(Registers&...) {
    ::emulation::warp_collective(
        "wgmma_fence", 0xffffffffu, nullptr, nullptr,
        [](const void* const*, void* const*, uint32_t) { ::emulation::wgmma_warp().fenced = true; });
}

inline void wgmma_commit() {
    ::emulation::warp_collective("wgmma_commit", 0xffffffffu, nullptr, nullptr,
                                 [](const void* const*, void* const*, uint32_t) {
                                     ::emulation::WgmmaWarp& warp = ::emulation::wgmma_warp();
                                     warp.groups.push_back(std::move(warp.open));
                                     warp.open.clear();
                                 });
}

template <int Pending, typename... Results>
inline void wgmma_wait(Results&... results) {
    const int pending = Pending;
    ::emulation::warp_collective("wgmma_wait", 0xffffffffu, &pending, nullptr, ::emulation::wait_wgmma);
    (::emulation::demand_complete(results), ...);
}

template <typename T, bool ColumnsInner, size_t Registers>
inline void wgmma(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    constexpr bool kBf16 = std::is_same<T, __nv_bfloat16>::value;
    static_assert(kBf16 || std::is_same<T, __half>::value, "bfloat16 or float16");
    const ::emulation::WgmmaCall call{
        d, a, b, static_cast<int>(2 * Registers), accumulate != 0, ColumnsInner, kBf16};
    ::emulation::warp_collective("wgmma", 0xffffffffu, &call, nullptr, ::emulation::issue_wgmma);
}

}  // namespace rk::cuda::ptx
