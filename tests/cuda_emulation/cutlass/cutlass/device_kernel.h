// In place of CUTLASS's: its kernels are started by our own launch().
#pragma once

namespace cutlass {

template <typename Kernel>
void device_kernel(typename Kernel::Params);

}  // namespace cutlass
