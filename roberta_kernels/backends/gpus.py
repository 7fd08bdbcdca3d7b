"""What keeps the kernels from running on a GPU: known from its number, or found by running one of them there."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from roberta_kernels.backends.op_namespaces import Kernels

LOWEST = 80  # compute capability times ten


def too_old(arch: int) -> dict[str, str]:
    """Backend -> why it cannot run on GPUs of this compute capability (times ten)."""
    if arch >= LOWEST:
        return {}
    why = f"compute capability {arch / 10} is below 8.0: no bfloat16 products, and too little shared memory"
    return dict.fromkeys(("cuda", "triton"), why)


def can_probe() -> bool:
    """Whether something may be run on a GPU now, and tells about it: nothing is being traced, captured or mapped."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.cuda.is_current_stream_capturing()
    )


def probe(kernels: Iterable[Kernels], device: torch.device) -> dict[str, str]:
    """Backend -> why it cannot run on this device, by one launch of each on a row of 16.

    A library without code for the GPU, a driver that is too old for it, a missing compiler: each makes the launch
    itself fail, so nothing is waited for.
    """
    found = {}
    for one in kernels:
        try:
            row = torch.ones((1, 16), device=device, dtype=torch.float32)
            with torch._C._AutoDispatchBelowAutograd():
                one.add_layer_norm_forward(row, row, row[0], row[0], 1e-5, None, 0.0, None)
        except Exception as error:  # whatever it is, a call would raise it
            found[one.name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return found
