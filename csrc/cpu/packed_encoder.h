// Arguments of an encoder's inference on weights that were packed once (weight_kinds.h), with float32 hidden
// states.
#pragma once
#include "csrc/cpu/encoder.h"
#include "csrc/cpu/weight_kinds.h"

namespace rk::cpu {

using PackedEncoderArgs = EncoderArgs<PackedWeight>;

}  // namespace rk::cpu

RK_DECLARE_ENTRY(pack_weight, PackWeightArgs)
RK_DECLARE_ENTRY(packed_encoder, PackedEncoderArgs)
