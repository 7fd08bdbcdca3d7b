// The products of gelu_ffn that go through GELU, for Hopper: CUTLASS 3.x, TMA and wgmma.
//
// Forward: a tile of x w_in^T is multiplied on tensor cores; while its float32 sums are still in registers
// the epilogue adds the bias, applies GELU and sends the activation, and the pre-activation if backward will
// want it, to memory through TMA. Backward: the tile of grad_out w_out; the tile of the pre-activation
// arrives by TMA meanwhile; the epilogue turns the sums into the gradient of the pre-activation, computes the
// activation again from the same erf, and leaves the column sums of the tile for b_in's gradient.
//
// Scheduling: persistent blocks of three warpgroups. One loads; the two others take tiles in turn
// ("pingpong"), so that the epilogue of one runs under the products of the other. That matters more here than
// in most GEMMs: the depth is 768 or 1024, 12 or 16 steps of 64, some 6100 clocks of wgmma for a 128 x 128
// tile, and GELU takes 128 x 128 x ~30 instructions, some 3800 clocks of a warpgroup's four schedulers. In
// turn they would be added, beside each other the products hide the GELU. Clusters of two row tiles share
// their tile of the weights. Fewer tiles than multiprocessors: tiles of 64 x 128, without clusters, and each
// block has one.
//
// Bytes (T = 8192, H = O = 768, F = 3072, bfloat16): forward reads 17 MB and writes 50 (training: 101),
// backward reads 68 and writes 101: 16 to 39 us at 4.3 TB/s. Flops: 2 T H F = 39 G a product, 49 us at 790
// TFLOP/s: the floor is arithmetic, and memory, forward and training, stays below it.
//
// Each dtype is compiled in a file of its own (gelu_ffn_bfloat16_sm90.cu, gelu_ffn_float16_sm90.cu): together
// they would be the longest part of a build.
//
// Of the three nodes below two are the CUTLASS store of an auxiliary tensor, which computes what it stores
// and hands on what comes of it; the third sums columns.
#pragma once
#include <launch.cuh>

#include "csrc/cuda/gelu.cuh"
#include "csrc/cuda/gelu_ffn.h"
#include "csrc/cuda/gelu_ffn_cutlass.h"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace rk::cuda {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
using fusion::sm90_partition_for_epilogue;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using StrideMNL = cutlass::detail::TagToStrideC_t<RowMajor>;
static_assert(cute::is_same_v<StrideMNL, Stride<int64_t, _1, int64_t>>);

// The base of both nodes: Sm90AuxStore with one more argument.
template <class Store>
struct StoreWithForm : Store {
    struct Arguments {
        typename Store::Arguments store;
        bool tanh;
    };
    struct Params {
        typename Store::Params store;
        bool tanh;
    };
    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape& shape, const Arguments& args,
                                                    void* workspace) {
        return {Store::to_underlying_arguments(shape, args.store, workspace), args.tanh};
    }
    template <class ProblemShape>
    static bool can_implement(const ProblemShape& shape, const Arguments& args) {
        return Store::can_implement(shape, args.store);
    }
    template <class ProblemShape>
    static size_t get_workspace_size(const ProblemShape& shape, const Arguments& args) {
        return Store::get_workspace_size(shape, args.store);
    }
    template <class ProblemShape>
    static cutlass::Status initialize_workspace(const ProblemShape& shape, const Arguments& args,
                                                void* workspace, cudaStream_t stream,
                                                cutlass::CudaHostAdapter* adapter = nullptr) {
        return Store::initialize_workspace(shape, args.store, workspace, stream, adapter);
    }

    CUTLASS_HOST_DEVICE StoreWithForm() {}
    CUTLASS_HOST_DEVICE StoreWithForm(const Params& params, const typename Store::SharedStorage& shared)
        : Store(params.store, shared), tanh(params.tanh) {}
    bool tanh = false;
};

// (sums, bias) -> gelu(sums + bias); stores sums + bias, unless the address is null.
template <class Store>
struct BiasGelu : StoreWithForm<Store> {
    using StoreWithForm<Store>::StoreWithForm;

    template <class Base>
    struct Callbacks : Base {
        bool tanh;
        CUTLASS_DEVICE Callbacks(Base&& base, bool tanh) : Base(static_cast<Base&&>(base)), tanh(tanh) {}

        template <class Sum, class Bias, int N>
        CUTLASS_DEVICE auto visit(const cutlass::Array<Sum, N>& frg_acc, int epi_v, int epi_m, int epi_n,
                                  const cutlass::Array<float, N>& sums, const cutlass::Array<Bias, N>& bias) {
            cutlass::Array<float, N> pre, activation;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < N; ++i) pre[i] = sums[i] + static_cast<float>(bias[i]);
            Base::visit(frg_acc, epi_v, epi_m, epi_n, pre);
            gelu<N>(activation, pre, tanh);
            return activation;
        }
    };

    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
        auto base = Store::template get_consumer_store_callbacks<ReferenceSrc>(args);
        return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base), this->tanh);
    }
};

// (sums, pre-activation) -> sums * gelu'(pre-activation); stores gelu(pre-activation).
template <class Store>
struct GeluGradient : StoreWithForm<Store> {
    using StoreWithForm<Store>::StoreWithForm;

    template <class Base>
    struct Callbacks : Base {
        bool tanh;
        CUTLASS_DEVICE Callbacks(Base&& base, bool tanh) : Base(static_cast<Base&&>(base)), tanh(tanh) {}

        template <class Sum, class Pre, int N>
        CUTLASS_DEVICE auto visit(const cutlass::Array<Sum, N>& frg_acc, int epi_v, int epi_m, int epi_n,
                                  const cutlass::Array<float, N>& sums,
                                  const cutlass::Array<Pre, N>& preactivation) {
            const auto pre = cutlass::NumericArrayConverter<float, Pre, N, kRound>{}(preactivation);
            cutlass::Array<float, N> activation, grad;
            gelu_backward<N>(activation, grad, sums, pre, tanh);
            Base::visit(frg_acc, epi_v, epi_m, epi_n, activation);
            return grad;
        }
    };

    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
        auto base = Store::template get_consumer_store_callbacks<ReferenceSrc>(args);
        return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base), this->tanh);
    }
};

// Hands its input on, and sums it over the rows of the tile: each warp leaves one row of partial sums. Rows
// past the last token need no check: TMA reads them as zeros, and 0 * gelu'(0) adds nothing. (CUTLASS has a
// node for this, Sm90RowReduction, whose exchange between lanes indexes registers by run-time numbers here:
// 544 bytes of local memory a thread.)
template <class Tile>
struct ColumnSums {
    struct SharedStorage {};
    struct Arguments {
        float* sums;    // [row tiles * kSm90PartialsOfTile, pitch]
        int64_t pitch;  // whole tiles of columns
    };
    using Params = Arguments;
    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
        return args;
    }
    template <class ProblemShape>
    static bool can_implement(const ProblemShape&, const Arguments&) {
        return true;
    }
    template <class ProblemShape>
    static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
        return 0;
    }
    template <class ProblemShape>
    static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }

    CUTLASS_HOST_DEVICE ColumnSums() {}
    CUTLASS_HOST_DEVICE ColumnSums(const Params& params, const SharedStorage&) : params(params) {}
    Params params;

    CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
    CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
    template <class... Args>
    CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::detail::ProducerLoadArgs<Args...>&) {
        return fusion::detail::EmptyProducerLoadCallbacks{};
    }

    template <class Registers, class Memory>
    struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
        Registers sums;  // (CPY,CPY_M,CPY_N,EPI_M,EPI_N), stride 0 down the rows: one for each column
        Memory to;       // where each of them goes
        bool inside;     // the tile has rows: the last cluster may reach past the problem
        CUTLASS_DEVICE Callbacks(Registers&& sums, const Memory& to, bool inside)
            : sums(static_cast<Registers&&>(sums)), to(to), inside(inside) {}

        template <class Sum, int N>
        CUTLASS_DEVICE auto visit(const cutlass::Array<Sum, N>&, int epi_v, int epi_m, int epi_n,
                                  const cutlass::Array<float, N>& values) {
            Tensor part = sums(_, _, _, epi_m, epi_n);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < N; ++i) part(epi_v * N + i) += values[i];
            return values;
        }

        CUTLASS_DEVICE void end() {
            Tensor column_sums = filter_zeros(sums);
            Tensor column_to = filter_zeros(to);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < size(column_sums); ++i) {
                float sum = column_sums(i);
                CUTLASS_PRAGMA_UNROLL
                for (int distance = 4; distance < 32; distance *= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
                if (inside && threadIdx.x % 32 < 4) column_to(i) = sum;
            }
        }
    };

    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
        // Which lanes and warps lie along the rows, from the layout of the copy itself.
        using Copy = cute::remove_cvref_t<decltype(args.tiled_copy)>;
        auto value_of_place =
            [] {
                if constexpr (ReferenceSrc)
                    return right_inverse(typename Copy::TiledLayout_TV{});
                else
                    return right_inverse(Copy::get_layoutD_TV());
            }()
                .with_shape(shape(typename Copy::Tiler_MN{}));
        using Warps = Int<Copy::TiledNumThr::value / 32>;
        auto lane_of_place = composition(Layout<Shape<_32, Warps, _1>, Stride<_1, _0, _0>>{}, value_of_place);
        auto warp_of_place = composition(Layout<Shape<_32, Warps, _1>, Stride<_0, _1, _0>>{}, value_of_place);
        static_assert(cute::is_same_v<decltype(filter(get<0>(lane_of_place))), Layout<_8, _4>>,
                      "eight lanes, four apart, lie along the rows");
        static_assert(decltype(size(filter(get<0>(warp_of_place))))::value == kSm90PartialsOfTile,
                      "all warps lie along the rows");

        auto [m, n, k, l] = args.tile_coord_mnkl;
        const int warp = args.thread_idx / 32;
        float* row = params.sums + (static_cast<int64_t>(m) * kSm90PartialsOfTile + warp) * params.pitch +
                     static_cast<int64_t>(n) * size<1>(Tile{});
        Tensor tile =
            make_tensor(make_gmem_ptr(row), make_layout(take<0, 2>(Tile{}), make_stride(_0{}, _1{})));
        Tensor to =
            sm90_partition_for_epilogue<ReferenceSrc>(tile, args.epi_tile, args.tiled_copy, args.thread_idx);
        Tensor sums = make_tensor_like<float>(to);
        fill(sums, 0.0f);
        const bool inside = m * size<0>(Tile{}) < get<0>(args.problem_shape_mnkl);
        return Callbacks<decltype(sums), decltype(to)>(static_cast<decltype(sums)&&>(sums), to, inside);
    }
};

template <FusedTile>
struct Shapes;
template <>
struct Shapes<FusedTile::large> {
    using Tile = Shape<Int<kLargeTileRows>, Int<kLargeTileColumns>, _64>;
    using Cluster = Shape<_2, _1, _1>;
};
template <>
struct Shapes<FusedTile::small> {
    using Tile = Shape<_64, _128, _64>;
    using Cluster = Shape<_1, _1, _1>;
};

// Product of A [rows, depth] and B, with the columns of D last: `LayoutB` is ColumnMajor for B stored as
// [columns, depth] and RowMajor for [depth, columns].
template <class Element, FusedTile kTile, bool kBackward>
struct Gemm {
    using Tile = typename Shapes<kTile>::Tile;
    using Cluster = typename Shapes<kTile>::Cluster;
    using LayoutB = cute::conditional_t<kBackward, RowMajor, ColumnMajor>;
    // Backward reads the pre-activation as CUTLASS's C; forward has none.
    using ElementC = cute::conditional_t<kBackward, Element, void>;
    static constexpr int kAlignment = 16 / sizeof(Element);

    using Schedule = cutlass::epilogue::TmaWarpSpecialized;  // of pingpong blocks
    using Descriptor = cutlass::epilogue::collective::detail::EpilogueDescriptor<
        Tile, cutlass::epilogue::collective::EpilogueTileAuto, ElementC, Element, Schedule>;
    using StoreDescriptor =
        cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, Element>;
    using Store = fusion::Sm90AuxStore<StoreDescriptor::Stages, typename Descriptor::EpilogueTile, Element,
                                       kRound, StrideMNL, typename StoreDescriptor::SmemLayoutAtom,
                                       typename StoreDescriptor::CopyOpR2S>;
    // One value for each column of D: stride 0 down the rows, 1 along a row.
    using Bias = fusion::Sm90RowBroadcast<0, Tile, Element, float, Stride<_0, _1, _0>>;
    using ForwardEpilogue = fusion::Sm90EVT<BiasGelu<Store>, fusion::Sm90AccFetch, Bias>;
    using BackwardEpilogue =
        fusion::Sm90EVT<ColumnSums<Tile>, fusion::Sm90EVT<GeluGradient<Store>, fusion::Sm90AccFetch,
                                                          fusion::Sm90SrcFetch<Element>>>;

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementC, RowMajor, kAlignment,
        Element, RowMajor, kAlignment, Schedule,
        cute::conditional_t<kBackward, BackwardEpilogue, ForwardEpilogue>>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, LayoutB,
        kAlignment, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
    using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static_assert(cute::is_same_v<typename Kernel::StrideA, Stride<int64_t, _1, int64_t>>,
                  "A: [rows, depth]");
    static_assert(
        cute::is_same_v<typename Kernel::StrideB, cute::conditional_t<kBackward, Stride<_1, int64_t, int64_t>,
                                                                      Stride<int64_t, _1, int64_t>>>,
        "B: [columns, depth] forward, [depth, columns] backward");
    static_assert(cute::is_same_v<typename Kernel::StrideD, StrideMNL>, "D: [rows, columns]");

    typename Device::Arguments arguments{};

    Gemm(int64_t rows, int64_t columns, int64_t depth, const void* a, const void* b, void* d,
         int multiprocessors) {
        arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
        arguments.problem_shape = {static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(depth),
                                   1};
        arguments.mainloop.ptr_A = static_cast<const Element*>(a);
        arguments.mainloop.dA = make_stride(depth, _1{}, int64_t{0});
        arguments.mainloop.ptr_B = static_cast<const Element*>(b);
        if constexpr (kBackward)
            arguments.mainloop.dB = make_stride(_1{}, columns, int64_t{0});
        else
            arguments.mainloop.dB = make_stride(depth, _1{}, int64_t{0});
        arguments.epilogue.ptr_D = static_cast<Element*>(d);
        arguments.epilogue.dD = make_stride(columns, _1{}, int64_t{0});
        arguments.hw_info.sm_count = multiprocessors;
    }

    void run(cudaStream_t stream) {
        Device device;
        check_cutlass(Device::can_implement(arguments), "sizes");
        if (Device::get_workspace_size(arguments) != 0)
            throw std::logic_error("gelu_ffn: CUTLASS asks for a workspace, and none was expected");
        check_cutlass(device.initialize(arguments, nullptr, stream), "preparation");
        check_cutlass(device.run(stream), "launch");
    }
};

template <class Element, FusedTile kTile>
auto forward_gemm(const FusedForward& args) {
    Gemm<Element, kTile, false> gemm(args.tokens, args.inner, args.hidden, args.x, args.w_in, args.activation,
                                     args.device.multiprocessors);
    const StrideMNL stride = make_stride(args.inner, _1{}, int64_t{0});
    gemm.arguments.epilogue.thread = {
        {},                                                                // the sums
        {static_cast<const Element*>(args.b_in), Element(0), {}},          // the bias
        {{static_cast<Element*>(args.preactivation), stride}, args.tanh},  // BiasGelu
    };
    return gemm;
}

template <class Element>
auto backward_gemm(const FusedBackward& args) {
    Gemm<Element, FusedTile::large, true> gemm(args.tokens, args.inner, args.outer, args.grad_out, args.w_out,
                                               args.grad_preactivation, args.device.multiprocessors);
    const StrideMNL stride = make_stride(args.inner, _1{}, int64_t{0});
    gemm.arguments.epilogue.ptr_C = static_cast<const Element*>(args.preactivation);
    gemm.arguments.epilogue.dC = stride;
    gemm.arguments.epilogue.thread = {
        {
            {},                                                             // the sums
            {},                                                             // the pre-activation
            {{static_cast<Element*>(args.activation), stride}, args.tanh},  // GeluGradient
        },
        {args.partials.data, args.partials.pitch},  // ColumnSums
    };
    return gemm;
}

template <class Element>
void backward(const FusedBackward& args) {
    backward_gemm<Element>(args).run(args.device.stream);
}

template <class Element>
void forward_of(const FusedForward& args) {
    if (fused_forward_tile(args.tokens, args.inner, args.device.multiprocessors) == FusedTile::large)
        forward_gemm<Element, FusedTile::large>(args).run(args.device.stream);
    else
        forward_gemm<Element, FusedTile::small>(args).run(args.device.stream);
}

}  // namespace
}  // namespace rk::cuda
