// out = x weight^T + bias by the products of the encoder, for what stands beside its layers: a decoder's projections of
// a token each, and its product with the vocabulary.
#include "csrc/cpu/linear.h"

#if defined(RK_CPU_ISA_AMX)
#    include "csrc/cpu/tile_layers.h"
#else
#    include "csrc/cpu/in_place_products.h"
#endif

namespace rk::cpu::RK_CPU_ISA {
namespace {

#if !defined(RK_CPU_ISA_AMX)
template <class T>
void multiply_rows(const LinearArgs& a) {
    InPlaceProducts<T>::project(&a.weight, &a.bias, 1, static_cast<const T*>(a.x), a.tokens,
                                static_cast<T*>(a.out));
}
#endif

}  // namespace

void linear(const LinearArgs& a) {
#if defined(RK_CPU_ISA_AMX)
    on_parts(a.bf16, [&](auto parts, auto element) {
        using T = decltype(element);
        const T* const bias = static_cast<const T*>(a.bias);
        project_rows<parts()>(&a.weight, &bias, 1, static_cast<const T*>(a.x), a.tokens,
                              static_cast<T*>(a.out));
    });
#else
    a.bf16 ? multiply_rows<bf16>(a) : multiply_rows<float>(a);
#endif
}

}  // namespace rk::cpu::RK_CPU_ISA
