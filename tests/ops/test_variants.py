"""The CUDA library's variants of an op: each against float64 on ragged, unaligned and masked sizes, and that it is the
one that ran. A call that a variant does not take goes to one below it, and nothing else would tell.

On the emulation the portable ones run and gelu_ffn's "sm80" (where it found CUTLASS's headers), attention's "sm90" with
tests/cuda_emulation/hopper.py; on a Hopper GPU all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from roberta_kernels import backends, ops

from . import test_attention, test_gelu_ffn
from .cases import (
    BFLOAT16,
    DEVICE,
    FLOAT16,
    FLOAT32,
    Draw,
    Variant,
    calls_go_to,
    cuda_variants,
    output_and_gradients,
    uninitialised_is_nan,
)
from .test_gelu_ffn import Case, draw_inputs

both_dtypes = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])


def library() -> Any:
    return torch.ops.roberta_kernels_cuda


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """The one that a test was parametrised with, set."""
    with request.param.setting():
        yield request.param


def leave_to_others(variant: Variant, case: str) -> None:
    """The portable ones are emulated in all other op tests, and it takes long."""
    if backends.emulating() and variant.name == "portable" and case != "ragged":
        pytest.skip("emulated in the tests of the op")


# ------------------------------------------------------------------------------------------------ attention

# More keys than shared memory holds at a time, tiles with one row in use, sequences without one, heads side by side.
ATTENTION = [
    test_attention.Case("ragged", (97, 1, 64, 0, 130), 2, 64, layout="projection"),
    test_attention.Case("long", (640, 3), 1, 64, layout="projection", heavy=True),
    test_attention.Case("holes", (150, 70), 2, 64, mask="holes", grad="transposed"),
    test_attention.Case("causal-unaligned", (129, 40), 2, 64, causal=True, layout="columns", grad="columns"),
    test_attention.Case("cross", (16, 33), 1, 64, keys=(200, 5)),
    test_attention.Case("dropout", (140, 20), 2, 32, dropout_p=0.1, layout="projection"),
    test_attention.Case("d128", (97, 150), 1, 128, mask="left"),
]


@both_dtypes
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.id)
@pytest.mark.parametrize("variant", cuda_variants("attention"), indirect=True)
def test_attention_three_way(variant: Variant, case: test_attention.Case, dtype: torch.dtype, draw: Draw) -> None:
    leave_to_others(variant, case.id)
    backward = "portable" if case.head_dim == 128 else variant.name  # sm90 has no backward of 128
    with calls_go_to("attention", variant.name, backward):
        test_attention.run_case(case, draw, dtype)


@pytest.mark.parametrize("variant", cuda_variants("attention", portable=False), indirect=True)
@pytest.mark.parametrize(("dtype", "head_dim"), [(FLOAT32, 64), (BFLOAT16, 80)], ids=["float32", "d80"])
def test_attention_that_it_does_not_take(variant: Variant, dtype: torch.dtype, head_dim: int, draw: Draw) -> None:
    with calls_go_to("attention", "portable", "portable"):
        test_attention.run_case(test_attention.Case("", (40, 7), 1, head_dim), draw, dtype)


# ------------------------------------------------------------------------------------------------ gelu_ffn

# Tiles are 128 x 128 or 64 x 64 (sm90: 64 x 128); 32 or 64 of the depth are multiplied at a time.
GELU_FFN = [
    Case("one-tile", 64, 64, 64, 64),
    Case("ragged", 97, 72, 136, 40, layout="columns"),
    Case("ragged-tanh", 130, 40, 264, 24, approximate="tanh", b_out=False),
    Case("deep", 65, 520, 72, 200, grad="transposed"),
    Case("shallow", 129, 8, 8, 8),
    Case("tails", 64, 32, 64, 32, spread=8.0),
    Case("768", 200, 768, 256, 768, heavy=True),
]
each_fused = pytest.mark.parametrize("variant", cuda_variants("gelu_ffn", portable=False), indirect=True)


@both_dtypes
@pytest.mark.parametrize("case", GELU_FFN, ids=lambda case: case.id)
@pytest.mark.parametrize("variant", cuda_variants("gelu_ffn"), indirect=True)
def test_gelu_ffn_three_way(variant: Variant, case: Case, dtype: torch.dtype, draw: Draw) -> None:
    leave_to_others(variant, case.id)
    with calls_go_to("gelu_ffn", variant.name, variant.name):
        test_gelu_ffn.run_case(case, draw, dtype)


@both_dtypes
@each_fused
def test_gelu_ffn_is_not_the_portable_one(variant: Variant, dtype: torch.dtype, draw: Draw) -> None:
    """The activation is made from the sums before they are rounded: some of 64 x 64 outputs must differ."""
    inputs, grad = draw_inputs(Case("", 64, 64, 256, 64), draw, dtype)
    ours = output_and_gradients(ops.gelu_ffn, inputs, grad)
    with Variant("gelu_ffn", "portable").setting():
        portable = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert not torch.equal(ours["output"], portable["output"])
    assert not torch.equal(ours["gradient of w_in"], portable["gradient of w_in"])


@pytest.mark.parametrize("save", [True, False])
@each_fused
def test_gelu_ffn_pre_activation(variant: Variant, draw: Draw, save: bool) -> None:
    x, w_in = draw.normal(70, 32, dtype=BFLOAT16), draw.normal(72, 32, dtype=BFLOAT16, std=0.2)
    b_in, w_out = draw.normal(72, dtype=BFLOAT16), draw.normal(8, 72, dtype=BFLOAT16)
    with uninitialised_is_nan(x):
        _, pre = library().gelu_ffn_forward(x, w_in, b_in, w_out, None, False, save)
    if not save:
        assert pre.shape == (0,)
        return
    exact = x.double() @ w_in.double().t() + b_in.double()
    torch.testing.assert_close(pre.double(), exact, rtol=torch.finfo(BFLOAT16).eps, atol=1e-5)


@each_fused
def test_gelu_ffn_itself(variant: Variant) -> None:
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


@each_fused
def test_gelu_ffn_is_repeatable_bit_for_bit(variant: Variant, draw: Draw) -> None:
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
@each_fused
def test_gelu_ffn_that_it_does_not_take(
    variant: Variant, draw: Draw, tokens: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    inputs, grad = draw_inputs(Case("", tokens, hidden, inner, hidden), draw, dtype)
    with calls_go_to("gelu_ffn", "portable", "portable"):
        ours = output_and_gradients(ops.gelu_ffn, inputs, grad)
    with Variant("gelu_ffn", "portable").setting():
        portable = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert all(torch.equal(ours[name], portable[name]) for name in ours)


@each_fused
def test_gelu_ffn_of_unaligned_tensors(variant: Variant, draw: Draw) -> None:
    """A contiguous tensor whose address is no multiple of 16 bytes."""

    def shifted(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        room[1:].copy_(t.flatten())
        return room[1:].view(t.shape)

    inputs, grad = draw_inputs(Case("", 64, 64, 64, 64), draw, BFLOAT16)
    with calls_go_to("gelu_ffn", "portable", "portable"):
        ours = output_and_gradients(ops.gelu_ffn, {name: shifted(t) for name, t in inputs.items()}, grad)
    with Variant("gelu_ffn", "portable").setting():
        portable = output_and_gradients(ops.gelu_ffn, inputs, grad)
    assert torch.equal(ours["output"], portable["output"])


@pytest.mark.parametrize("variant", cuda_variants("attention")[:1], indirect=True)
def test_unknown_names_are_errors(variant: Variant) -> None:
    with pytest.raises(RuntimeError, match=r"gelu_ffn has no variant .* it has portable"):
        library().set_variant("gelu_ffn", "sm70")
    with pytest.raises(RuntimeError, match="attention, gelu_ffn"):
        library().set_variant("gelu", "portable")
    with pytest.raises(RuntimeError, match="no variant"):
        library().served("attention", "sm80", False)
