// Defines the namespace of this library from the package's schemas. Compiled into the CPU library as
// roberta_kernels_cpu and into the CUDA library as roberta_kernels_cuda; the kernels register themselves
// against it in their own *_binding.cpp (CPU) or .cu files.
#include <torch/csrc/stable/library.h>

#ifdef __GLIBC__
// libstdc++ asks this variable of glibc 2.32 whether it may count references without atomic instructions. With one of our
// own that says no (hidden, as every symbol here), the library loads wherever torch's own wheels do: glibc 2.28.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

#ifdef ROBERTA_KERNELS_CUDA
STABLE_TORCH_LIBRARY(roberta_kernels_cuda, m) {
    // Which variant of its kernels an op may use (csrc/cuda/variants.h).
    m.def("get_variant(str op) -> str");
    m.def("set_variant(str op, str variant) -> ()");
    // How many calls a variant has run so far.
    m.def("served(str op, str variant, bool backward) -> int");
#else
STABLE_TORCH_LIBRARY(roberta_kernels_cpu, m) {
    // Which compiled instruction set is used: an index into rk::cpu::kIsaNames; set_isa returns what was set
    // before.
    m.def("get_isa() -> int");
    m.def("set_isa(int isa) -> int");
    m.def("isa_available(int isa) -> bool");
    m.def("set_float32_parts(int parts) -> int");
    // As encoder, on quantised copies (roberta_kernels/quantized).
    m.def("pack_weight(Tensor weight, str kind) -> Tensor");
    m.def(
        "packed_encoder(Tensor x, Tensor[] layers, Tensor cu_seqlens, SymInt max_seqlen, Tensor? key_mask, "
        "bool causal, int heads, float scale, float eps, bool tanh, Tensor? bias=None) -> Tensor");
    // Checksums of some parts of weights (csrc/cpu/checksum_binding.cpp).
    m.def("checksum_weights(Tensor[] weights, int[] in_file, int[] first, int count, int parts) -> Tensor");
    // Inference, without gradients: few queries [B, heads, Q, head_dim] against a cache [B, heads, K, head_dim] that is read
    // where it lies; key_mask [B, K] -> [B, Q, heads, head_dim].
    m.def(
        "cached_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, float scale, bool "
        "causal) -> "
        "Tensor");
    // Inference, without gradients: x weight^T + bias, with the weight read where it lies.
    m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
#endif
    // Inference, without gradients: all layers of an encoder in one call, on the parameters themselves
    // (roberta_kernels/encoder_call.py has the order of `layers`).
    m.def(
        "encoder(Tensor x, Tensor[] layers, Tensor cu_seqlens, SymInt max_seqlen, Tensor? key_mask, "
        "bool causal, int heads, float scale, float eps, bool tanh, Tensor? bias=None) -> Tensor");
#define RK_SCHEMA(schema) m.def(schema);
#include "roberta_kernels/schemas.def"
#undef RK_SCHEMA
}
