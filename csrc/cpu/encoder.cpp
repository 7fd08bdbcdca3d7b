// All layers of an encoder in one call, on the parameters themselves.
#include "csrc/cpu/encoder.h"

#include "csrc/cpu/encoder_layers.h"
#include "csrc/cpu/in_place_products.h"

namespace rk::cpu::RK_CPU_ISA {

void encoder(const EncoderInPlaceArgs& a) {
    if (a.bf16)
        run_encoder(a, InPlaceProducts<bf16>{});
    else
        run_encoder(a, InPlaceProducts<float>{});
}

}  // namespace rk::cpu::RK_CPU_ISA
