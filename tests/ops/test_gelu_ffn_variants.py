"""gelu_ffn's CUDA variants: GELU in the epilogue of the product, beside the portable one that test_gelu_ffn.py runs.

On the emulation "sm80" runs (where it found CUTLASS's headers), on a Hopper GPU "sm90" too. A call that a variant does
not take is served by the next below it, so one test sees to it that such sizes as these are taken: some bits of the
answer are others than the portable variant's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from roberta_kernels import backends, ops

from . import eager
from .cases import BFLOAT16, DEVICE, FLOAT16, FLOAT32, Draw, check_three_way, output_and_gradients, uninitialised_is_nan
from .test_gelu_ffn import Case, draw_inputs

AVAILABLE = bool(backends.available_backends()["cuda"])
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the cuda backend is not available")

# Tiles are 128 x 128 or 64 x 64 (sm90: 64 x 128); 32 or 64 of the depth are multiplied at a time.
CASES = [
    Case("one-tile", 64, 64, 64, 64),
    Case("ragged", 97, 72, 136, 40, layout="columns"),
    Case("ragged-tanh", 130, 40, 264, 24, approximate="tanh", b_out=False),
    Case("deep", 65, 520, 72, 200, grad="transposed"),
    Case("shallow", 129, 8, 8, 8),
    Case("tails", 64, 32, 64, 32, spread=8.0),
    Case("768", 200, 768, 256, 768, heavy=True),
]


def library() -> Any:
    return torch.ops.roberta_kernels_cuda


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    before = library().get_variant("gelu_ffn")
    library().set_variant("gelu_ffn", name)
    try:
        yield
    finally:
        library().set_variant("gelu_ffn", before)


def served(name: str) -> str | None:
    """Why a variant cannot be tested here, or None."""
    if not AVAILABLE:
        return "the cuda backend is not available"
    try:
        with variant(name):
            pass
    except RuntimeError as error:
        return str(error)
    if name == "sm90" and (DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0)):
        return "needs a Hopper GPU"
    return None


@pytest.fixture(params=["sm80", "sm90"])
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    why_not = served(request.param)
    if why_not is not None:
        pytest.skip(why_not)
    with backends.backend("cuda"), variant(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_three_way(fused: str, case: Case, dtype: torch.dtype, draw: Draw) -> None:
    inputs, grad = draw_inputs(case, draw, dtype)
    check_three_way(
        lambda **tensors: ops.gelu_ffn(**tensors, approximate=case.approximate),
        lambda **tensors: eager.gelu_ffn(**tensors, approximate=case.approximate),
        inputs,
        grad,
    )


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_it_is_not_the_portable_one(fused: str, dtype: torch.dtype, draw: Draw) -> None:
    """The activation is made from the sums before they are rounded: some of 64 x 64 outputs must differ."""
    inputs, grad = draw_inputs(Case("", 64, 64, 256, 64), draw, dtype)
    ours = output_and_gradients(ops.gelu_ffn, inputs, grad)
    with variant("portable"):
        portable = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert not torch.equal(ours["output"], portable["output"])
    assert not torch.equal(ours["gradient of w_in"], portable["gradient of w_in"])


@pytest.mark.parametrize("save", [True, False])
def test_pre_activation(fused: str, draw: Draw, save: bool) -> None:
    x, w_in = draw.normal(70, 32, dtype=BFLOAT16), draw.normal(72, 32, dtype=BFLOAT16, std=0.2)
    b_in, w_out = draw.normal(72, dtype=BFLOAT16), draw.normal(8, 72, dtype=BFLOAT16)
    with uninitialised_is_nan(x):
        _, pre = library().gelu_ffn_forward(x, w_in, b_in, w_out, None, False, save)
    if not save:
        assert pre.shape == (0,)
        return
    exact = x.double() @ w_in.double().t() + b_in.double()
    torch.testing.assert_close(pre.double(), exact, rtol=torch.finfo(BFLOAT16).eps, atol=1e-5)


def test_gelu_itself(fused: str) -> None:
    """With identity weights and no bias the op is GELU, over all of its range; a row or a column out of place shows."""
    width = 64
    x = torch.linspace(-12, 12, 64 * width, dtype=torch.float64).to(BFLOAT16).reshape(64, width).to(DEVICE)
    eye = torch.eye(width, dtype=BFLOAT16, device=DEVICE)
    zero = torch.zeros(width, dtype=BFLOAT16, device=DEVICE)
    got = output_and_gradients(lambda x: ops.gelu_ffn(x, eye, zero, eye, zero), {"x": x}, torch.ones_like(x))
    exact = output_and_gradients(torch.nn.functional.gelu, {"input": x.double()}, torch.ones_like(x).double())
    for got_one, exact_one in zip(got.values(), exact.values(), strict=True):
        allowed = 2 * torch.finfo(BFLOAT16).eps * exact_one.abs() + 1e-6 * x.double().abs().clamp(min=1.0)
        assert bool(((got_one.double() - exact_one).abs() <= allowed).all())


def test_repeatable_bit_for_bit(fused: str, draw: Draw) -> None:
    inputs, grad = draw_inputs(Case("", 300, 64, 136, 64), draw, BFLOAT16)
    first = output_and_gradients(ops.gelu_ffn, inputs, grad)
    again = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "dtype"),
    [
        (63, 64, 64, BFLOAT16),
        (64, 63, 64, BFLOAT16),
        (64, 64, 65, BFLOAT16),
        (64, 64, 64, FLOAT32),
        (0, 64, 64, BFLOAT16),
    ],
)
def test_what_it_does_not_take_is_served_by_the_portable_one(
    fused: str, draw: Draw, tokens: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    inputs, grad = draw_inputs(Case("", tokens, hidden, inner, hidden), draw, dtype)
    ours = output_and_gradients(ops.gelu_ffn, inputs, grad)
    with variant("portable"):
        portable = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert all(torch.equal(ours[name], portable[name]) for name in ours)


def test_unaligned_tensors_are_served(fused: str, draw: Draw) -> None:
    """A contiguous tensor whose address is no multiple of 16 bytes."""

    def shifted(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        room[1:].copy_(t.flatten())
        return room[1:].view(t.shape)

    inputs, grad = draw_inputs(Case("", 64, 64, 64, 64), draw, BFLOAT16)
    ours = output_and_gradients(ops.gelu_ffn, {name: shifted(t) for name, t in inputs.items()}, grad)
    with variant("portable"):
        portable = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert torch.equal(ours["output"], portable["output"])


def test_unknown_names_are_errors() -> None:
    with pytest.raises(RuntimeError, match=r"gelu_ffn has no variant .* it has portable"):
        library().set_variant("gelu_ffn", "sm70")
    with pytest.raises(RuntimeError, match="attention, gelu_ffn"):
        library().set_variant("gelu", "portable")
    assert library().get_variant("attention") == "portable"
