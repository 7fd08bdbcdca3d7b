#include "csrc/cpu/dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#    include <cpuid.h>
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

namespace rk::cpu {

#if defined(__x86_64__)
namespace {

// Whether the processor has tiles of bfloat16 and int8 of the size that amx.h takes for granted, and whether the
// operating system lets this process use them: it must be asked, once. Some virtual machines announce AMX and have no
// palette, or an operating system that does not keep the tiles.
bool request_amx() {
#    if defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kTile | kInt8 | kBf16)) != 0) return false;
    if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return false;
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
    // 8192 bytes in all, 1024 a tile, 64 a row, 8 tiles, 16 rows
    if (a != (1024u << 16 | 8192u) || b != (8u << 16 | 64u) || (c & 0xffffu) != 16) return false;
    // products of up to 16 rows of B by 64 bytes
    if (!__get_cpuid_count(0x1e, 0, &a, &b, &c, &d) || (b & 0xffu) != 16 || (b >> 8 & 0xffffu) != 64)
        return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1u) == 0) return false;  // xgetbv is there
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;
    if ((low & kTileState) != kTileState) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#    else
    return false;
#    endif
}

}  // namespace
#endif

bool isa_available(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case Isa::portable:
            return true;
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx512:
            return avx512;
        case Isa::avx512_bf16:
            return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
        case Isa::amx: {
            static const bool permitted = request_amx();
            return permitted && isa_available(Isa::avx512_bf16);
        }
    }
    return false;
#else
    return isa == Isa::portable;
#endif
}

namespace {

Isa best_isa() {
    for (int isa = kIsaCount - 1; isa > 0; --isa)
        if (isa_available(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
    return Isa::portable;
}

// A name that is unknown or that this processor lacks is refused by the Python side, which reads the same
// variable (roberta_kernels/backends); here it only must not crash.
Isa initial_isa() {
    const char* asked = std::getenv("ROBERTA_KERNELS_CPU_ISA");
    if (asked != nullptr)
        for (int isa = 0; isa < kIsaCount; ++isa)
            if (std::strcmp(asked, kIsaNames[isa]) == 0 && isa_available(static_cast<Isa>(isa)))
                return static_cast<Isa>(isa);
    return best_isa();
}

std::atomic<int>& active() {
    static std::atomic<int> isa{static_cast<int>(initial_isa())};
    return isa;
}

int64_t get_isa_op() {
    return active().load(std::memory_order_relaxed);
}

bool isa_available_op(int64_t isa) {
    return isa >= 0 && isa < kIsaCount && isa_available(static_cast<Isa>(isa));
}

int64_t set_isa_op(int64_t isa) {
    STD_TORCH_CHECK(isa_available_op(isa), "instruction set ", isa, " is not available on this processor");
    return active().exchange(static_cast<int>(isa));
}

thread_local int parts_of_float32 = 3;

int64_t set_float32_parts_op(int64_t parts) {
    STD_TORCH_CHECK(parts >= 1 && parts <= 3, "parts must be 1, 2 or 3, got ", parts);
    return std::exchange(parts_of_float32, static_cast<int>(parts));
}

}  // namespace

int float32_parts() {
    return parts_of_float32;
}

Isa active_isa() {
    return static_cast<Isa>(active().load(std::memory_order_relaxed));
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
    torch::stable::parallel_for(begin, end, grain,
                                [body, context](int64_t b, int64_t e) { body(b, e, context); });
}

int num_threads() {
    return static_cast<int>(torch::stable::get_num_threads());
}

}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("get_isa", TORCH_BOX(&rk::cpu::get_isa_op));
    m.impl("set_isa", TORCH_BOX(&rk::cpu::set_isa_op));
    m.impl("set_float32_parts", TORCH_BOX(&rk::cpu::set_float32_parts_op));
    m.impl("isa_available", TORCH_BOX(&rk::cpu::isa_available_op));
}
