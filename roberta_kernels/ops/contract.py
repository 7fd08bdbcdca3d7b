"""What the public ops share: argument checks, and registration of fake functions and autograd formulas.

The checks read sizes, dtypes and devices only. What would need the device to be read (the values in cu_seqlens, ids) is
checked where the data is on the host, by the op or the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from roberta_kernels import backends, reference

# Messages are made where something is wrong alone: making one takes as long as a launch, and would tie a traced graph
# to the sizes in it.


def check_dims(name: str, tensor: Tensor, dims: int, filled: int | None, expected: str) -> None:
    """tensor has so many dimensions, and that one of them is not empty."""
    if tensor.dim() != dims or (filled is not None and tensor.shape[filled] == 0):
        raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """tensor has `shape` (None: any size), and the dtype and device of `like`."""
    check_shape(name, tensor, shape)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, as the other tensors, got {tensor.dtype}")
    check_device(name, tensor, like)


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if tensor.dim() == len(shape):
        for have, want in zip(tensor.shape, shape, strict=True):
            if want is not None and have != want:
                break
        else:
            return
    wanted = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the other tensors, got {tensor.device}")


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or (reference only) float64, got {tensor.dtype}")


def check_dropout(dropout_p: float, seed: Tensor | None, like: Tensor) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("dropout_p > 0 requires a seed: an int64 tensor of one element (see ops.draw_seeds)")
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int64 tensor of one element, got {seed.dtype} of shape {list(seed.shape)}"
            )
        check_device("seed", seed, like)


def readable(tensor: Tensor) -> bool:
    """Whether what a tensor holds may decide what runs: it holds something, and nothing is traced, mapped or
    captured.
    """
    if type(tensor) is not Tensor or tensor.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


_PLAIN: Any = SimpleNamespace(**reference.KERNELS)  # in the place of a namespace: functions, where there ops are
_functions: dict[Any, type[torch.autograd.Function]] = {}  # *_forward op -> the same as an autograd function


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Runs a `*_forward` op by the cheapest way that is right for the call.

    Traced: the plain op, with the formula that torch.library has of it. Inside a torch.func transform (grad, jvp,
    vmap, ...) or under forward-mode differentiation, for which the op has no formula: the reference, as plain torch
    that these follow. Else, where a gradient is needed, as an autograd function (some 30 us cheaper than
    torch.library's way to the same formula); where none is, without autograd.
    """
    # torch would take the derivative of an op without a forward-mode formula for zero, and say nothing.
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise NotImplementedError("a traced graph has no forward-mode derivative of this op")
        return op(*args)
    if torch._C._functorch.maybe_current_level() is not None or (
        forward_ad._current_level >= 0
        and any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args)
    ):
        with torch._C._DisableAutocast():
            return getattr(_PLAIN, op.__name__.partition(".")[0])(*args)
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return _functions[op].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def register(
    op: str,
    *,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    again: Callable[..., tuple[Any, ...]],
) -> None:
    """Registers an op's fake functions and its autograd formula in every namespace.

    backward(kernels, ctx, saved, *grads) is the formula; kernels is the namespace that ran forward, saved is what
    setup_context saved. again(kernels, ctx, saved) gives the same with what forward computed of it computed anew.

    A gradient that shall be differentiated in its turn (backward with create_graph=True) is computed by the reference,
    as plain torch that autograd follows, to any order: from what is saved of forward's inputs, and what else is saved
    computed of them again, since a saved result would count as a constant.
    """
    for kernels in backends.namespaces().values():
        torch.library.register_fake(f"{kernels.namespace}::{op}_forward", fake_forward)
        torch.library.register_fake(f"{kernels.namespace}::{op}_backward", fake_backward)

        def formula(ctx: Any, *grads: Any, _kernels: backends.Kernels = kernels) -> Any:
            saved = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return backward(_kernels, ctx, saved, *grads)
            with torch._C._DisableAutocast():
                return backward(_PLAIN, ctx, again(_PLAIN, ctx, saved), *grads)

        torch.library.register_autograd(f"{kernels.namespace}::{op}_forward", formula, setup_context=setup_context)
        overload = getattr(kernels, f"{op}_forward")
        _functions[overload] = _autograd_function(op, overload, setup_context, formula)


def _autograd_function(
    name: str, overload: Callable[..., Any], setup_context: Callable[..., None], formula: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*args)
        setup_context(ctx, args, output)
        return output

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(formula)})
