// The products of gelu_ffn that go through GELU, for sm_80 and everything later: CUTLASS 2.x, mma.sync
// m16n8k16 fed by a pipeline of cp.async and ldmatrix.
//
// Forward: a block owns a tile of x w_in^T; its float32 sums go through shared memory, a few rows at a time,
// into the order in which they are stored, 16 bytes a thread; there the epilogue adds the bias, writes the
// pre-activation if backward will want it, applies GELU and writes the activation. Backward: the tile of
// grad_out w_out; the epilogue reads the pre-activation in the same order, writes the gradient of the
// pre-activation and the activation, computed again from the same erf, and leaves the column sums of the tile
// for b_in's gradient: one row of partial sums for each row of tiles, added up in their order by
// column_sum.cu.
//
// Bytes (T = 8192, H = O = 768, F = 3072, bfloat16): forward reads 17 MB and writes 50 (training: 101),
// backward reads 68 and writes 101; an A100 moves them in 43 to 110 us at 1.55 TB/s. Flops: 2 T H F = 39 G a
// product, 124 us at its 312 TFLOP/s: the floor is arithmetic. GELU, ~30 instructions for each element, is
// about a tenth of the clocks; the other block of the multiprocessor multiplies meanwhile.
//
// Scheduling: blocks of four warps, each 64 x 64 of a 128 x 128 tile, 32 deep, four stages (64 KiB of shared
// memory: two blocks on an A100, one on sm_86 and sm_89). Neighbouring blocks go down the rows in groups that
// share columns of the weights in L2. Fewer tiles than multiprocessors: tiles of 64 x 64, 64 deep.
//
// Of the three nodes below two are the CUTLASS store of an auxiliary tensor, which computes what it stores
// and hands on what comes of it; the third sums columns.
#include <launch.cuh>

#include "csrc/cuda/gelu.cuh"
#include "csrc/cuda/gelu_ffn.h"
#include "csrc/cuda/gelu_ffn_cutlass.h"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"

// After those: it relies on what they declare.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

namespace rk::cuda {
namespace {

using namespace cute;
namespace visitors = cutlass::epilogue::threadblock;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kEpilogueStages = 1;

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using StrideMNL = Stride<int64_t, _1, int64_t>;

// The base of both nodes: VisitorAuxStore with one more argument, and no store where the address is null.
template <class Store>
struct StoreWithForm : Store {
    struct Arguments {
        typename Store::Arguments store;
        bool tanh;
    };
    using Params = Arguments;
    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
        return args;
    }
    template <class ProblemShape>
    static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
        return 0;
    }

    CUTLASS_HOST_DEVICE StoreWithForm() {}
    CUTLASS_HOST_DEVICE StoreWithForm(const Params& params, const typename Store::SharedStorage& shared)
        : Store(params.store, shared), tanh(params.tanh) {}
    bool tanh;

    template <class Base>
    struct Callbacks : Base {
        bool tanh;
        CUTLASS_DEVICE Callbacks(Base&& base, bool tanh) : Base(static_cast<Base&&>(base)), tanh(tanh) {}
        CUTLASS_DEVICE void end_step(int step) {
            if (this->params_ptr->ptr_aux != nullptr) Base::end_step(step);
        }
    };
};

// (sums, bias) -> gelu(sums + bias); stores sums + bias.
template <class Store>
struct BiasGelu : StoreWithForm<Store> {
    using StoreWithForm<Store>::StoreWithForm;

    template <class Base>
    struct Callbacks : StoreWithForm<Store>::template Callbacks<Base> {
        using Parent = typename StoreWithForm<Store>::template Callbacks<Base>;
        using Parent::Parent;

        template <class Sum, class Bias, int N>
        CUTLASS_DEVICE auto visit(int iteration, int row, int column, int fragment,
                                  const cutlass::Array<Sum, N>& frg_acc, const cutlass::Array<float, N>& sums,
                                  const cutlass::Array<Bias, N>& bias) {
            cutlass::Array<float, N> pre, activation;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < N; ++i) pre[i] = sums[i] + static_cast<float>(bias[i]);
            Base::visit(iteration, row, column, fragment, frg_acc, pre);
            gelu<N>(activation, pre, this->tanh);
            return activation;
        }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
        auto base = Store::get_callbacks(tile, thread, shape);
        return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base), this->tanh);
    }
};

// (sums, pre-activation) -> sums * gelu'(pre-activation); stores gelu(pre-activation).
template <class Store>
struct GeluGradient : StoreWithForm<Store> {
    using StoreWithForm<Store>::StoreWithForm;

    template <class Base>
    struct Callbacks : StoreWithForm<Store>::template Callbacks<Base> {
        using Parent = typename StoreWithForm<Store>::template Callbacks<Base>;
        using Parent::Parent;

        template <class Sum, class Pre, int N>
        CUTLASS_DEVICE auto visit(int iteration, int row, int column, int fragment,
                                  const cutlass::Array<Sum, N>& frg_acc, const cutlass::Array<float, N>& sums,
                                  const cutlass::Array<Pre, N>& preactivation) {
            const auto pre = cutlass::NumericArrayConverter<float, Pre, N, kRound>{}(preactivation);
            cutlass::Array<float, N> activation, grad;
            gelu_backward<N>(activation, grad, sums, pre, this->tanh);
            Base::visit(iteration, row, column, fragment, frg_acc, activation);
            return grad;
        }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
        auto base = Store::get_callbacks(tile, thread, shape);
        return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base), this->tanh);
    }
};

// What VisitorRowReduction does with the sums of a tile, for which it expects an atomic addition: exactly one
// tile writes each partial sum, so it is a plain store.
template <class T>
struct StoreSum {
    CUTLASS_DEVICE void operator()(T* to, const T& sum) const { *to = sum; }
};

// Hands its input on, and sums it over the rows of the tile: VisitorRowReduction, but for the addition
// itself, whose function there lacks its return statement (CUTLASS 4.2), which is undefined behaviour: g++
// makes an endless loop of it.
template <class RowReduction>
struct ColumnSums : RowReduction {
    using RowReduction::RowReduction;

    template <class Base>
    struct Callbacks : Base {
        CUTLASS_DEVICE explicit Callbacks(Base&& base) : Base(static_cast<Base&&>(base)) {}

        template <class Sum, int N>
        CUTLASS_DEVICE auto visit(int iteration, int row, int column, int, const cutlass::Array<Sum, N>&,
                                  const cutlass::Array<float, N>& values) {
            if (get<0>(this->tRS_cSrc(column, row, iteration)) < this->m) {
                Tensor sums = recast<cutlass::Array<float, N>>(coalesce(this->tRS_rSrc));
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < N; ++i) sums[column][i] += values[i];
            }
            return values;
        }
    };

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
        auto base = RowReduction::get_callbacks(tile, thread, shape);
        return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base));
    }
};

template <FusedTile>
struct Shapes;
template <>
struct Shapes<FusedTile::large> {
    using Block = cutlass::gemm::GemmShape<kLargeTileRows, kLargeTileColumns, 32>;
    using Warp = cutlass::gemm::GemmShape<64, 64, 32>;
    static constexpr int kStages = 4;
};
template <>
struct Shapes<FusedTile::small> {
    using Block = cutlass::gemm::GemmShape<64, 64, 64>;
    using Warp = cutlass::gemm::GemmShape<32, 32, 64>;
    static constexpr int kStages = 4;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreadCount)
    fused_kernel(const __grid_constant__ typename Kernel::Params params) {
    Kernel::invoke(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared_memory()));
}

// Product of A [rows, depth] and B, with the columns of D last: `LayoutB` is ColumnMajor for B stored as
// [columns, depth] and RowMajor for [depth, columns].
template <class Element, FusedTile kTile, bool kBackward>
struct Gemm {
    using Block = typename Shapes<kTile>::Block;
    using Warp = typename Shapes<kTile>::Warp;
    using LayoutB = cute::conditional_t<kBackward, RowMajor, ColumnMajor>;
    static constexpr int kAlignment = 16 / sizeof(Element);

    using ThreadMap = visitors::OutputTileThreadLayout<Block, Warp, Element, kAlignment, kEpilogueStages>;
    using Store = visitors::VisitorAuxStore<ThreadMap, Element, kRound, StrideMNL>;
    // One value for each column of D: stride 0 down the rows, 1 along a row.
    using Bias = visitors::VisitorRowBroadcast<ThreadMap, Element, Stride<_0, _1, _0>>;
    using Preactivation = visitors::VisitorAuxLoad<ThreadMap, Element, StrideMNL>;
    // Sums over the rows of a tile. Where they go is said as a stride down the rows of D, of which the first
    // of each tile counts: pitch / kLargeTileRows, so that the next row of tiles is one partial row further.
    using Sums = ColumnSums<visitors::VisitorRowReduction<cutlass::plus, StoreSum, ThreadMap, float, float,
                                                          kRound, Stride<int64_t, _1, _0>>>;
    using Activated = visitors::Sm80EVT<BiasGelu<Store>, visitors::VisitorAccFetch, Bias>;
    using Gradient =
        visitors::Sm80EVT<Sums,
                          visitors::Sm80EVT<GeluGradient<Store>, visitors::VisitorAccFetch, Preactivation>>;
    using Epilogue = visitors::Sm80EVT<Store, cute::conditional_t<kBackward, Gradient, Activated>>;

    using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
        Element, RowMajor, cutlass::ComplexTransform::kNone, kAlignment, Element, LayoutB,
        cutlass::ComplexTransform::kNone, kAlignment, Element, RowMajor, kAlignment, float, float,
        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp, cutlass::gemm::GemmShape<16, 8, 16>,
        Epilogue, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, Shapes<kTile>::kStages,
        cutlass::arch::OpMultiplyAdd, kEpilogueStages>::GemmKernel;
    static_assert(cute::is_same_v<typename Kernel::LayoutA, RowMajor> &&
                  cute::is_same_v<typename Kernel::LayoutB, LayoutB>);

    static void run(int64_t rows, int64_t columns, int64_t depth, const void* a, const void* b,
                    typename Epilogue::Arguments epilogue, const FusedDevice& device) {
        // Of the strides, those of A and B count: the nodes of the epilogue carry their own.
        const typename Kernel::Arguments arguments(
            cutlass::gemm::GemmUniversalMode::kGemm,
            {static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(depth)}, 1, epilogue, a, b,
            nullptr, nullptr, 0, 0, 0, 0, depth, kBackward ? columns : depth, columns, columns);
        check_cutlass(Kernel::can_implement(arguments), "sizes");
        const typename Kernel::Params params(arguments, device.multiprocessors, /*blocks on each=*/1);
        launch(fused_kernel<Kernel>,
               {params.get_grid_dims(), dim3(Kernel::kThreadCount), sizeof(typename Kernel::SharedStorage),
                device.stream},
               params);
    }
};

template <class Element, FusedTile kTile>
void forward(const FusedForward& args) {
    const StrideMNL stride = make_stride(args.inner, _1{}, int64_t{0});
    Gemm<Element, kTile, false>::run(
        args.tokens, args.inner, args.hidden, args.x, args.w_in,
        {
            {
                {},                                                                // the sums
                {static_cast<const Element*>(args.b_in), Element(0), {}},          // the bias
                {{static_cast<Element*>(args.preactivation), stride}, args.tanh},  // BiasGelu
            },
            {static_cast<Element*>(args.activation), stride},  // D
        },
        args.device);
}

template <class Element>
void backward(const FusedBackward& args) {
    const StrideMNL stride = make_stride(args.inner, _1{}, int64_t{0});
    // An auxiliary tensor that is only read has no const pointer in CUTLASS.
    Element* preactivation = const_cast<Element*>(static_cast<const Element*>(args.preactivation));
    static_assert(kLargeTileColumns % kLargeTileRows == 0, "the pitch is a multiple of kLargeTileRows");
    Gemm<Element, FusedTile::large, true>::run(
        args.tokens, args.inner, args.outer, args.grad_out, args.w_out,
        {
            {
                {
                    {},                                                             // the sums
                    {preactivation, Element(0), stride},                            // the pre-activation
                    {{static_cast<Element*>(args.activation), stride}, args.tanh},  // GeluGradient
                },
                {args.partials.data, 0.0f, make_stride(args.partials.pitch / kLargeTileRows, _1{}, _0{})},
            },
            {static_cast<Element*>(args.grad_preactivation), stride},  // D
        },
        args.device);
}

template <class Element>
void forward_of(const FusedForward& args) {
    if (fused_forward_tile(args.tokens, args.inner, args.device.multiprocessors) == FusedTile::large)
        forward<Element, FusedTile::large>(args);
    else
        forward<Element, FusedTile::small>(args);
}

}  // namespace

void fused_forward_sm80(const FusedForward& args) {
    if (args.dtype == Dtype::bfloat16)
        forward_of<cutlass::bfloat16_t>(args);
    else
        forward_of<cutlass::half_t>(args);
}

void fused_backward_sm80(const FusedBackward& args) {
    if (args.dtype == Dtype::bfloat16)
        backward<cutlass::bfloat16_t>(args);
    else
        backward<cutlass::half_t>(args);
}

}  // namespace rk::cuda
