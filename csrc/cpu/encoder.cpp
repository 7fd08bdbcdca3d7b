// All layers of an encoder in one call, on the parameters themselves.
#include "csrc/cpu/encoder.h"

#include "csrc/cpu/encoder_layers.h"
#if defined(RK_CPU_ISA_AMX)
#    include "csrc/cpu/tile_layers.h"
#else
#    include "csrc/cpu/in_place_products.h"
#endif

namespace rk::cpu::RK_CPU_ISA {

void encoder(const EncoderInPlaceArgs& a) {
#if defined(RK_CPU_ISA_AMX)
    on_parts(a.bf16,
             [&](auto parts, auto element) { run_encoder(a, TileProducts<decltype(element), parts()>{}); });
#else
    if (a.bf16)
        run_encoder(a, InPlaceProducts<bf16>{});
    else
        run_encoder(a, InPlaceProducts<float>{});
#endif
}

}  // namespace rk::cpu::RK_CPU_ISA
