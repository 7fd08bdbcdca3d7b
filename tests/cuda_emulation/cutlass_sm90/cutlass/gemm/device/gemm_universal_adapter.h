// In place of CUTLASS's: nothing here launches a whole kernel.
#pragma once
#include "cutlass/cutlass.h"

namespace cutlass::gemm::device {

template <class Kernel>
struct GemmUniversalAdapter {
    using Arguments = typename Kernel::Arguments;
    static Status can_implement(const Arguments&);
    static size_t get_workspace_size(const Arguments&);
    Status initialize(const Arguments&, void*, cudaStream_t);
    Status run(cudaStream_t);
};

}  // namespace cutlass::gemm::device
