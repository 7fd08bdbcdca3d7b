"""The CUDA library's op `encoder`, run on the emulation: against plain torch in float64, and against the single ops.

python tests/cuda_emulation/build.py --plain -- python -m pytest tests/cuda_emulation/test_encoder.py
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cpu.encoder_cases import EPS, make_layers, plain
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.tolerance import assert_three_way

pytestmark = [
    pytest.mark.cuda_source,
    pytest.mark.skipif(not backends.emulating(), reason="runs on the emulation (see the head of this file)"),
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: an element that is read and was not written shows."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def model(count: int, hidden: int, inner: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return [{name: tensor.to(dtype) for name, tensor in layer.items()} for layer in make_layers(count, hidden, inner)]


def tensors(layers: list[dict[str, Tensor]]) -> list[Tensor]:
    """The op's argument `layers`."""
    found = []
    for w in layers:
        for weight, bias in zip(w["qkv"].chunk(3), w["qkv_bias"].chunk(3), strict=True):
            found += [weight.contiguous(), bias.contiguous()]
        for name in ("attention_out", "attention_norm", "inner", "out", "norm"):
            found += [w[f"{name}_weight"] if "norm" in name else w[name], w[f"{name}_bias"]]
    return found


def call(x: Tensor, layers: list[Tensor], lengths: list[int], heads: int, **options: Any) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {"max_seqlen": max(lengths, default=0), "key_mask": None, "causal": False, "tanh": False, **options}
    return torch.ops.roberta_kernels_cuda.encoder(
        x, layers, ends, given["max_seqlen"], given["key_mask"], given["causal"], heads,
        given.get("scale", (x.shape[1] // heads) ** -0.5), EPS, given["tanh"], given.get("bias"),
    )  # fmt: skip


def check(dtype: torch.dtype, hidden: int, inner: int, heads: int, lengths: list[int], **options: Any) -> None:
    layers = model(2, hidden, inner, dtype)
    x = torch.randn(sum(lengths), hidden).to(dtype)
    ours = call(x, tensors(layers), lengths, heads, **options)
    given = {name: value for name, value in options.items() if name != "max_seqlen"}
    exact = plain(x.double(), layers, lengths, heads, **given)
    assert_three_way(ours, plain(x, layers, lengths, heads, **given), exact, floor_ulps=8.0)


@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
def test_sizes_of_heads(dtype: torch.dtype, head_dim: int) -> None:
    check(dtype, 2 * head_dim, 3 * head_dim + 1, 2, [5, 19])


@EVERY_DTYPE
@pytest.mark.parametrize("lengths", [[1], [2, 3], [17, 0, 12], [70, 1, 29]], ids=str)
def test_lengths(dtype: torch.dtype, lengths: list[int]) -> None:
    check(dtype, 64, 96, 4, lengths)
    check(dtype, 64, 96, 4, lengths, max_seqlen=1000)  # an upper bound


@EVERY_DTYPE
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_causal_and_rows_that_are_no_keys(dtype: torch.dtype, tanh: bool) -> None:
    lengths = [19, 33, 5]
    key_mask = torch.rand(sum(lengths)) < 0.7
    key_mask[[0, 19, 52]] = True
    for mask, causal in ((key_mask, True), (key_mask, False), (None, True)):
        check(dtype, 64, 96, 2, lengths, causal=causal, key_mask=mask, tanh=tanh)


@EVERY_DTYPE
@pytest.mark.parametrize("variant", ["portable", "sm80"])
def test_the_bits_of_the_single_ops(dtype: torch.dtype, variant: str) -> None:
    """In the order in which a layer calls them; enough tokens for the fused feed-forward. Counted alike."""
    try:
        torch.ops.roberta_kernels_cuda.set_variant("gelu_ffn", variant)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    try:
        hidden, lengths = 64, [40, 31]
        layers = model(2, hidden, 96, dtype)
        x = torch.randn(71, hidden).to(dtype)
        before = backends.cuda_served("gelu_ffn")
        want = step_by_step(x, tensors(layers), lengths, 4)
        between = backends.cuda_served("gelu_ffn")
        assert torch.equal(call(x, tensors(layers), lengths, 4), want)
        after = backends.cuda_served("gelu_ffn")
        assert {k: after[k] - between[k] for k in after} == {k: between[k] - before[k] for k in after}
    finally:
        torch.ops.roberta_kernels_cuda.set_variant("gelu_ffn", "portable")


def step_by_step(x: Tensor, layers: list[Tensor], lengths: list[int], heads: int) -> Tensor:
    kernels = backends.namespaces()["cuda"]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    for at in range(0, len(layers), 16):
        qw, qb, kw, kb, vw, vb, aw, ab, anw, anb, iw, ib, ow, ob, onw, onb = layers[at : at + 16]
        q, k, v = (
            torch.addmm(bias, x, weight.t()).view(len(x), heads, -1) for weight, bias in ((qw, qb), (kw, kb), (vw, vb))
        )
        scale, longest = (x.shape[1] // heads) ** -0.5, max(lengths)
        context, _ = kernels.attention_forward(
            q, k, v, ends, ends, longest, longest, scale, False, None, 0.0, None, None
        )
        product = context.view(len(x), -1) @ aw.t()
        attended = kernels.add_layer_norm_forward(product, x, anw, anb, EPS, ab, 0.0, None)[0]
        inner = kernels.gelu_ffn_forward(attended, iw, ib, ow, None, False, False)[0]
        x = kernels.add_layer_norm_forward(inner, attended, onw, onb, EPS, ob, 0.0, None)[0]
    return x


def test_layers_of_several_widths_and_none() -> None:
    layers = [*model(1, 64, 96, torch.float32), *model(1, 64, 40, torch.float32)]
    x = torch.randn(9, 64)
    exact = plain(x.double(), layers, [4, 5], 4)
    assert_three_way(call(x, tensors(layers), [4, 5], 4), plain(x, layers, [4, 5], 4), exact, floor_ulps=8.0)
    none = call(x, [], [4, 5], 4)
    assert torch.equal(none, x)
    assert none.data_ptr() != x.data_ptr()
    assert call(x[:0], tensors(layers), [0], 4).shape == (0, 64)


def test_rows_beyond_the_sequences_and_what_lies_unaligned() -> None:
    """Rows that belong to no sequence change no other; tensors may begin anywhere; x is not written."""
    layers = tensors(model(2, 64, 96, torch.bfloat16))
    x = torch.randn(20, 64).bfloat16()
    want = call(x, layers, [9, 11], 4)
    more = torch.cat([x, torch.randn(13, 64).bfloat16()])
    kept = more.clone()
    assert torch.equal(call(more, layers, [9, 11], 4)[:20], want)
    assert torch.equal(more, kept)
    unaligned = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in layers]
    assert all(t.data_ptr() % 16 for t in unaligned)
    assert_three_way(call(x, unaligned, [9, 11], 4), want, want.double(), floor_ulps=8.0)


def refused(names: str, *args: Any, **options: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        call(*args, **options)
    assert "encoder" in str(caught.value).splitlines()[0]
    assert names in str(caught.value).splitlines()[0]


def test_what_it_refuses() -> None:
    layers, x = tensors(model(2, 64, 96, torch.float32)), torch.randn(9, 64)
    call(x, layers, [4, 5], 4)  # else the refusals would prove nothing
    for at, name in enumerate(("query's weight", "query's bias", "key's weight", "key's bias", "value's weight")):
        for wrong in (layers[at].bfloat16(), layers[at][1:], layers[at][None]):
            given = [*layers[:16], *layers[16 : 16 + at], wrong, *layers[17 + at :]]
            with pytest.raises(RuntimeError) as caught:
                call(x, given, [4, 5], 4)
            message = str(caught.value).splitlines()[0]
            assert name in message or "layers differ" in message or "must have shape" in message, message
    turned = [*layers]
    turned[6] = turned[6].t()
    refused("the weight of the attention's output of layer 0 must be contiguous", x, turned, [4, 5], 4)
    refused("tensors for each layer", x, layers[:-1], [4, 5], 4)
    refused("x must have shape", x[None], layers, [4, 5], 4)
    refused("float32, bfloat16 or float16", x.double(), layers, [4, 5], 4)
    refused("do not divide into the heads", x, layers, [4, 5], 3, scale=1.0)
    refused("head_dim", x, layers, [4, 5], 8, scale=1.0)
    refused("heads must be positive", x, layers, [4, 5], -1, scale=1.0)
    refused("take no bias", x, layers, [4, 5], 4, bias=torch.zeros(4, 5, 5))
    refused("max_seqlen", x, layers, [4, 5], 4, max_seqlen=-1)
    refused("key_mask", x, layers, [4, 5], 4, key_mask=torch.ones(8, dtype=torch.bool))
    refused("no sequences", x, layers, [], 4)


def test_what_it_launches_stays_within_the_limits_of_a_gpu() -> None:
    """Seven kernels of ours would be too many for a layer: two norms, attention, GELU."""
    library = ctypes.CDLL(os.environ[backends.EMULATION_VARIABLE])
    layers, x = tensors(model(2, 64, 96, torch.float32)), torch.randn(9, 64)
    library.rk_emulation_take_launches(None, ctypes.c_int64(0))
    library.rk_emulation_set_dry_run(1)
    try:
        call(x, layers, [4, 5], 4)
        library.rk_emulation_take_launches.restype = ctypes.c_int64
        assert library.rk_emulation_take_launches(None, ctypes.c_int64(0)) == 2 * 4
    finally:
        library.rk_emulation_set_dry_run(0)


@pytest.mark.parametrize("smoke", [True])
def test_host_time_is_measured(smoke: bool) -> None:
    """The benchmark runs, and its parts are those of a forward."""
    from benchmarks import host_time

    results = host_time.measure(smoke=smoke)
    for parts in results["milliseconds"].values():
        assert all(milliseconds > 0 for milliseconds in parts.values())
        assert "of which: our ops" not in parts, "Python walks the layers"
    assert len(host_time.lines(results)) > 10
