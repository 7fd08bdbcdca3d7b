// The CPU kernels are compiled once per instruction set, each time into a namespace of its own (RK_CPU_ISA),
// and chosen at run time. An op declares its entry points for all of them with RK_DECLARE_ENTRY and calls the
// active one with RK_DISPATCH.
#pragma once
#include <cstdint>

namespace rk::cpu {

// Ordered from the plainest to the best: the highest that the processor has and the build holds is active,
// unless the environment variable ROBERTA_KERNELS_CPU_ISA or the op set_isa names another.
// avx512_bf16 stands for AVX512-VNNI too: no processor has the one without the other. amx is avx512_bf16 with the
// products on tiles (amx.h).
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kIsaCount = 5;

bool isa_available(Isa isa);
Isa active_isa();

// Of how many bfloat16 parts a float32 number is made where products are on tiles (tile_operands.h), in the calling
// thread: 3 unless the op set_float32_parts says otherwise, which is how torch.set_float32_matmul_precision arrives here
// (roberta_kernels/ops/matmul_precision.py).
int float32_parts();

// body(begin, end, context) over [begin, end) on torch's own thread pool; a range of at most `grain` runs in
// place. Declared here in plain C++ so that no torch header is compiled with instruction-set flags.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context);
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    parallel_for(
        begin, end, grain,
        [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
        const_cast<void*>(static_cast<const void*>(&f)));
}
int num_threads();

}  // namespace rk::cpu

#if defined(__x86_64__)
#    define RK_DECLARE_ENTRY(name, Args) \
        namespace rk::cpu::portable {    \
        void name(const Args&);          \
        }                                \
        namespace rk::cpu::avx2 {        \
        void name(const Args&);          \
        }                                \
        namespace rk::cpu::avx512 {      \
        void name(const Args&);          \
        }                                \
        namespace rk::cpu::avx512_bf16 { \
        void name(const Args&);          \
        }                                \
        namespace rk::cpu::amx {         \
        void name(const Args&);          \
        }
#    define RK_DISPATCH(name, args)                     \
        do {                                            \
            switch (::rk::cpu::active_isa()) {          \
                case ::rk::cpu::Isa::amx:               \
                    ::rk::cpu::amx::name(args);         \
                    break;                              \
                case ::rk::cpu::Isa::avx512_bf16:       \
                    ::rk::cpu::avx512_bf16::name(args); \
                    break;                              \
                case ::rk::cpu::Isa::avx512:            \
                    ::rk::cpu::avx512::name(args);      \
                    break;                              \
                case ::rk::cpu::Isa::avx2:              \
                    ::rk::cpu::avx2::name(args);        \
                    break;                              \
                default:                                \
                    ::rk::cpu::portable::name(args);    \
            }                                           \
        } while (false)
#else
#    define RK_DECLARE_ENTRY(name, Args) \
        namespace rk::cpu::portable {    \
        void name(const Args&);          \
        }
#    define RK_DISPATCH(name, args) ::rk::cpu::portable::name(args)
#endif
