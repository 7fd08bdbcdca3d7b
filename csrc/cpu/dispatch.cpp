#include "csrc/cpu/dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace rk::cpu {

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
// variable (roberta_kernels/backends.py); here it only must not crash.
Isa initial_isa() {
    const char* wish = std::getenv("ROBERTA_KERNELS_CPU_ISA");
    if (wish != nullptr)
        for (int isa = 0; isa < kIsaCount; ++isa)
            if (std::strcmp(wish, kIsaNames[isa]) == 0 && isa_available(static_cast<Isa>(isa)))
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

}  // namespace

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
    m.impl("isa_available", TORCH_BOX(&rk::cpu::isa_available_op));
}
