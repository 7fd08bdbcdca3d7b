// The epilogue of CUTLASS's Hopper kernel, run for given sums of a product, for test_gelu_ffn_sm90_epilogue.py.
//
// What runs is CUTLASS's CollectiveEpilogue::store with our nodes, from the arguments that csrc/cuda makes, in
// one warpgroup a tile: sums in registers as wgmma leaves them (by CuTe's partition of the tile), D and the
// auxiliary tensor through stmatrix, swizzled shared memory and TMA. Only the mainloop before it, and the loading
// warp, are left out: sums come from memory, and so do the parts of C when they are waited for.
#include "csrc/cuda/gelu_ffn_sm90.cuh"

namespace emulation {
namespace {

// What TMA knows of a tensor, innermost first.
struct Box {
    unsigned char* data;
    int64_t sizes[3], strides[3];
    int64_t box[3];
    int64_t swizzle_units;  // of 16 bytes, in a row of its pattern; 1: none
};
static_assert(sizeof(Box) <= sizeof(CUtensorMap));

// Brings the next part of C; set by the kernel below, by all threads alike.
std::function<void(int)> bring_next;
int waits[128];

void swap_matrices(const void* const in[32], void* const out[32], bool store) {
    for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
            auto* const row =
                static_cast<unsigned char*>(const_cast<void*>(in[matrix * 8 + lane / 4])) + lane % 4 * 4;
            auto* const value = static_cast<uint32_t*>(out[lane]) + matrix;
            store ? std::memcpy(row, value, 4) : std::memcpy(value, row, 4);
        }
}

template <bool kStore>
void swap_among_lanes(const void* row, void* registers) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a matrix's row that is not aligned: %p", row);
    struct Rows {
        const void* at;
    } const mine{row};
    warp_collective(kStore ? "stmatrix" : "ldmatrix", 0xffffffffu, &mine, registers,
                    [](const void* const in[32], void* const out[32], uint32_t) {
                        const void* rows[32];
                        for (int lane = 0; lane < 32; ++lane)
                            rows[lane] = static_cast<const Rows*>(in[lane])->at;
                        swap_matrices(rows, out, kStore);
                    });
}

}  // namespace

void store_matrices(const uint32_t (&from)[4], void* row) {
    uint32_t registers[4];
    std::memcpy(registers, from, sizeof(registers));
    swap_among_lanes<true>(row, registers);
}
void load_matrices(uint32_t (&to)[4], const void* row) {
    swap_among_lanes<false>(row, to);
}

namespace {

// visit(address in shared memory, address in global memory, or null outside of the tensor), for each element.
template <class Visit>
void each_of_box(const void* map, const void* shared, int x, int y, int z, const Visit& visit) {
    const Box& box = *static_cast<const Box*>(map);
    for (int64_t k = 0; k < box.box[2]; ++k)
        for (int64_t j = 0; j < box.box[1]; ++j)
            for (int64_t i = 0; i < box.box[0]; ++i) {
                const int64_t at[3] = {x + i, y + j, z + k};
                bool inside = true;
                for (int axis = 0; axis < 3; ++axis)
                    inside = inside && at[axis] >= 0 && at[axis] < box.sizes[axis];
                auto address = reinterpret_cast<uintptr_t>(shared) +
                               static_cast<uintptr_t>(((k * box.box[1] + j) * box.box[0] + i) * 2);
                address ^= (address >> 7 & static_cast<uintptr_t>(box.swizzle_units - 1)) << 4;
                visit(reinterpret_cast<void*>(address),
                      inside ? box.data + 2 * at[0] + at[1] * box.strides[1] + at[2] * box.strides[2]
                             : nullptr);
            }
}

}  // namespace

void store_box(const void* map, const void* from, int x, int y, int z) {
    each_of_box(map, from, x, y, z, [](const void* shared, void* global) {
        if (global != nullptr) std::memcpy(global, shared, 2);
    });
}
static void load_box(const void* map, void* to, int x, int y, int z) {
    each_of_box(map, to, x, y, z, [](void* shared, const void* global) {
        const uint16_t outside = 0;
        std::memcpy(shared, global != nullptr ? global : &outside, 2);
    });
}

void wait_for_load(const void*) {
    block_barrier(5, 128, 0);  // all have read the part before
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) bring_next(waits[0]);
    waits[thread] += 1;
    block_barrier(5, 128, 0);
}

}  // namespace emulation

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                           const cuuint64_t* sizes, const cuuint64_t* strides,
                                           const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
    emulation::Box made{static_cast<unsigned char*>(data), {1, 1, 1}, {2, 0, 0}, {1, 1, 1}, 1};
    for (cuuint32_t i = 0; i < rank; ++i) {
        if (i >= 3 && (box[i] != 1 || sizes[i] != 1)) return CUDA_ERROR_NOT_SUPPORTED;
        if (i >= 3) continue;
        made.sizes[i] = static_cast<int64_t>(sizes[i]);
        made.box[i] = box[i];
        if (i > 0) made.strides[i] = static_cast<int64_t>(strides[i - 1]);
        if (i > 0 && strides[i - 1] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    }
    made.swizzle_units = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 8
                         : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 4
                         : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 2
                                                                : 1;
    std::memcpy(map, &made, sizeof(made));
    return CUDA_SUCCESS;
}

namespace rk::cuda {
namespace {

constexpr int kThreads = 128;

// A block is a tile: (row tile, column tile).
template <class Kernel, class Epilogue>
void run_epilogue(typename Epilogue::Params params, const float* sums, int rows, int columns, int depth) {
    using Tile = typename Kernel::TileShape;
    const int thread = static_cast<int>(threadIdx.x), m = static_cast<int>(blockIdx.x),
              n = static_cast<int>(blockIdx.y);
    auto& shared = *reinterpret_cast<typename Epilogue::SharedStorage*>(shared_memory());
    emulation::waits[thread] = 0;

    typename Kernel::TiledMma product;
    Tensor accumulators = partition_fragment_C(product, take<0, 2>(Tile{}));
    Tensor places = product.get_thread_slice(thread).partition_C(make_identity_tensor(take<0, 2>(Tile{})));
    for (int i = 0; i < size(accumulators); ++i) {
        const int row = m * size<0>(Tile{}) + get<0>(places(i)),
                  column = n * size<1>(Tile{}) + get<1>(places(i));
        accumulators(i) = row < rows && column < columns ? sums[int64_t{row} * columns + column] : 0.0f;
    }

    if constexpr (!cute::is_void_v<typename Epilogue::ElementC>) {
        if (thread == 0)
            emulation::bring_next = [&params, &shared, m, n](int part) {
                constexpr int kHigh = size<0>(typename Epilogue::EpilogueTile{}),
                              kWide = size<1>(typename Epilogue::EpilogueTile{}),
                              kDown = size<0>(Tile{}) / kHigh, kStages = Epilogue::LoadPipeline::Stages;
                auto* const stages =
                    reinterpret_cast<unsigned char*>(shared.tensors.collective.smem_C.begin());
                emulation::load_box(params.tma_load_c.get_tma_descriptor(),
                                    stages + part % kStages * Epilogue::TmaTransactionBytes,
                                    n * size<1>(Tile{}) + part / kDown * kWide,
                                    m * size<0>(Tile{}) + part % kDown * kHigh, 0);
            };
    }
    __syncthreads();

    Epilogue epilogue(params, shared.tensors);
    typename Epilogue::LoadPipeline::Params load{};
    load.role = Epilogue::LoadPipeline::ThreadCategory::Consumer;
    load.consumer_arv_count = kThreads;
    typename Epilogue::LoadPipeline loads(shared.pipeline, load, cute::false_type{});
    typename Epilogue::StorePipeline stores;
    epilogue.store(loads, typename Epilogue::LoadPipelineState{}, stores,
                   cutlass::make_producer_start_state<typename Epilogue::StorePipeline>(),
                   make_shape(rows, columns, depth, 1), Tile{}, make_coord(m, n, _, 0), accumulators, product,
                   thread, shared.tensors);
}

template <class Kernel, class Epilogue>
void run_tiles(const typename Epilogue::Arguments& arguments, const float* sums, int rows, int columns,
               int depth) {
    using Tile = typename Kernel::TileShape;
    const auto params =
        Epilogue::to_underlying_arguments(make_shape(rows, columns, depth, 1), arguments, nullptr);
    const auto up = [](int a, int b) { return static_cast<unsigned>((a + b - 1) / b); };
    // A cluster of two row tiles may reach past the problem by one.
    const unsigned down = up(rows, 2 * size<0>(Tile{})) * 2;
    launch(run_epilogue<Kernel, Epilogue>,
           {dim3(down, up(columns, size<1>(Tile{}))), dim3(kThreads),
            sizeof(typename Epilogue::SharedStorage), nullptr},
           params, sums, rows, columns, depth);
}

// With one mistake: each pair of neighbours has the other's bias.
template <class Store>
struct SwapsBias : BiasGelu<Store> {
    using BiasGelu<Store>::BiasGelu;
    template <class Base>
    struct Callbacks : Base {
        CUTLASS_DEVICE explicit Callbacks(Base&& base) : Base(static_cast<Base&&>(base)) {}
        template <class Sum, class Bias, int N>
        CUTLASS_DEVICE auto visit(const cutlass::Array<Sum, N>& frg_acc, int epi_v, int epi_m, int epi_n,
                                  const cutlass::Array<float, N>& sums, const cutlass::Array<Bias, N>& bias) {
            cutlass::Array<Bias, N> swapped;
            for (int i = 0; i < N; ++i) swapped[i] = bias[i ^ 1];
            return Base::visit(frg_acc, epi_v, epi_m, epi_n, sums, swapped);
        }
    };
    template <bool ReferenceSrc, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
        auto base = BiasGelu<Store>::template get_consumer_store_callbacks<ReferenceSrc>(args);
        return Callbacks<decltype(base)>(static_cast<decltype(base)&&>(base));
    }
};

// The kernel's epilogue with another node in the place of BiasGelu.
template <class G, template <class> class Node>
using WithNode = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename G::Tile, typename G::Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, G::kAlignment,
    cutlass::bfloat16_t, RowMajor, G::kAlignment, typename G::Schedule,
    fusion::Sm90EVT<Node<typename G::Store>, fusion::Sm90AccFetch, typename G::Bias>>::CollectiveOp;

struct Call {
    const float* sums;    // [rows, columns]
    const void* bias;     // forward: [columns]
    const void* c;        // backward: the pre-activation
    void *d, *auxiliary;  // activation, pre-activation or null; backward: gradient, activation
    float* partials;
    int64_t pitch, rows, columns;
    int64_t tanh, small, faulty;
};

void run(const Call& call) {
    using Element = cutlass::bfloat16_t;
    const int rows = static_cast<int>(call.rows), columns = static_cast<int>(call.columns), depth = 64;
    if (call.c != nullptr) {
        FusedBackward args{};
        args.preactivation = call.c;
        args.grad_preactivation = call.d;
        args.activation = call.auxiliary;
        args.partials = {call.partials, 0, call.columns, call.pitch};
        args.tokens = call.rows, args.outer = depth, args.inner = call.columns, args.tanh = call.tanh != 0;
        const auto gemm = backward_gemm<Element>(args);
        using G = cute::remove_cvref_t<decltype(gemm)>;
        return run_tiles<typename G::Kernel, typename G::Epilogue>(gemm.arguments.epilogue, call.sums, rows,
                                                                   columns, depth);
    }
    FusedForward args{};
    args.b_in = call.bias;
    args.activation = call.d;
    args.preactivation = call.auxiliary;
    args.tokens = call.rows, args.hidden = depth, args.inner = call.columns, args.tanh = call.tanh != 0;
    const auto on = [&](const auto& gemm) {
        using G = cute::remove_cvref_t<decltype(gemm)>;
        run_tiles<typename G::Kernel, typename G::Epilogue>(gemm.arguments.epilogue, call.sums, rows, columns,
                                                            depth);
    };
    if (call.faulty != 0) {
        const auto gemm = forward_gemm<Element, FusedTile::small>(args);
        using G = cute::remove_cvref_t<decltype(gemm)>;
        using Faulty = WithNode<G, SwapsBias>;
        typename Faulty::Arguments arguments{};
        const StrideMNL stride = make_stride(args.inner, _1{}, int64_t{0});
        arguments.thread = {{},
                            {static_cast<const Element*>(args.b_in), Element(0), {}},
                            {{static_cast<Element*>(args.preactivation), stride}, args.tanh}};
        arguments.ptr_D = gemm.arguments.epilogue.ptr_D;
        arguments.dD = gemm.arguments.epilogue.dD;
        return run_tiles<typename G::Kernel, Faulty>(arguments, call.sums, rows, columns, depth);
    }
    if (call.small != 0)
        on(forward_gemm<Element, FusedTile::small>(args));
    else
        on(forward_gemm<Element, FusedTile::large>(args));
}

}  // namespace
}  // namespace rk::cuda

// Returns 0, or 1 where `message` (room for 512) says why.
extern "C" __attribute__((visibility("default"))) int rk_gelu_epilogue(const rk::cuda::Call* call,
                                                                       char* message) {
    try {
        rk::cuda::run(*call);
    } catch (const std::exception& error) {
        std::snprintf(message, 512, "%s", error.what());
        return 1;
    }
    return 0;
}
