"""Attention on Hopper, by the emulation of wgmma, mbarrier and bulk tensor copies, against float64."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from roberta_kernels.reference import attention as reference

from . import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"the CUDA emulation: {build.missing()}")
SOURCES = [
    build.HERE / "attention_sm90_entry.cpp",
    *(
        build.ROOT / "csrc/cuda" / name
        for name in ("attention_sm90.cu", "attention_backward_sm90.cu", "attention_backward_whole_sm90.cu")
    ),
]
NAME = "_attention_sm90.so"
BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    id: str
    lengths: tuple[int, ...]
    heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = BF16
    keys: tuple[int, ...] | None = None
    causal: bool = False
    mask: float | None = None  # how many keys may be seen
    unseen: tuple[int, int] | None = None  # keys that may not
    dropout_p: float = 0.0
    scale: float | None = None
    spread: float = 1.0
    contiguous: bool = False  # or views of one projection
    blocks: int = 3


CASES = [
    Case("1", (1,)),
    Case("7", (7,), heads=3),
    Case("64", (64,)),
    Case("65", (65,), dtype=FP16),
    Case("97", (97,), contiguous=True),
    Case("256", (256,)),
    Case("512", (512,)),
    Case("512-one-block", (512, 130), blocks=1),
    Case("600-head64-resident", (600,), heads=1),
    Case("700-streamed", (700, 30, 200), heads=1, blocks=2),
    Case("mixed", (7, 0, 97, 1, 257, 64, 0, 128), blocks=4),
    Case("short", (3, 9, 1, 64, 20, 33, 5, 60, 2, 40, 41), heads=3, blocks=2),
    Case("empty", (0, 0, 0)),
    Case("no-keys", (7, 2), keys=(0, 0)),
    Case("cross", (7, 130, 0, 65), keys=(97, 5, 64, 0)),
    Case("causal", (97, 1, 200), causal=True),
    Case("causal-more-keys", (70, 1, 33), keys=(197, 5, 40), causal=True),
    Case("causal-more-queries", (197, 5, 133), keys=(7, 1, 100), causal=True),
    Case("causal-streamed", (750,), heads=1, causal=True),
    Case("key-mask", (97, 200), mask=0.6),
    Case("key-mask-rare", (40, 130), mask=0.02, causal=True),
    Case("dropout", (97, 7, 130), dropout_p=0.1),
    Case("dropout-half", (200,), dropout_p=0.5, causal=True, mask=0.8, dtype=FP16),
    Case("sharp", (130, 97), spread=6.0),
    Case("scale-negative", (100,), scale=-0.3),
    Case("scale-zero", (100,), scale=0.0),
    Case("head128", (130, 7, 200), head_dim=128),
    Case("head128-512", (512,), heads=1, head_dim=128, dropout_p=0.1, causal=True),
    Case("head32", (130, 7, 200), head_dim=32),
    Case("head32-fp16", (513, 64), head_dim=32, dtype=FP16, dropout_p=0.2, mask=0.7),
    # Whole tiles and chunks of keys that nothing sees: first, between and last ones, and all of a sequence.
    Case("unseen-first", (300, 130), unseen=(0, 140)),
    Case("unseen-between", (300,), unseen=(60, 260), causal=True),
    Case("unseen-last", (300, 130), unseen=(190, 300), dropout_p=0.1),
    Case("unseen-sequence", (200, 300, 70), unseen=(200, 500), causal=True),
    Case("unseen-streamed", (750,), heads=1, unseen=(64, 700)),
    # Up to 128 keys backward is one kernel: heads of one tile of keys and of two, after each other.
    Case("whole", (128, 3, 127, 64, 65, 1, 0, 100), heads=3),
    Case("whole-one-block", (1, 128, 64, 65, 33), heads=3, dtype=FP16, blocks=1),
    Case("whole-mask", (97, 128, 64, 1), mask=0.6),
    Case("whole-mask-rare", (40, 128, 90), mask=0.02),
    Case("whole-unseen", (128, 100, 40), unseen=(60, 228)),
    Case("whole-dropout", (128, 7, 100), dropout_p=0.1, mask=0.8),
    Case("whole-dropout-fp16", (70, 128), dtype=FP16, dropout_p=0.5, scale=-0.2),
    Case("whole-sharp", (128, 97), spread=6.0),
    Case("whole-head32", (128, 7, 65), head_dim=32, dropout_p=0.2, mask=0.7),
    Case("whole-few-queries", (16, 3, 0, 64, 1), keys=(128, 65, 100, 70, 64)),
    Case("whole-streamed", (400, 70, 350), keys=(100, 30, 64), heads=1, dropout_p=0.1, blocks=2),
    Case("whole-no-keys", (70, 9, 200), keys=(0, 128, 0)),
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library("plain", sources=SOURCES, name=NAME)))


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def longest(inputs: dict[str, Any]) -> tuple[int, int]:
    """max_seqlen of queries and of keys."""
    q, k = ((inputs[name][1:] - inputs[name][:-1]).max().item() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    return int(q), int(k)


def address(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def call(
    library: ctypes.CDLL,
    inputs: dict[str, Any],
    out: Tensor,
    lse: Tensor,
    gradients: list[Tensor] | None,
    *,
    blocks: int,
    order: int,
) -> None:
    q, k, v, grad = (inputs[name] for name in ("q", "k", "v", "grad"))
    views = torch.tensor([x for t in (q, k, v, grad) for x in (t.data_ptr(), t.stride(0), t.stride(1))])
    sizes = torch.tensor([len(inputs["cu_seqlens_q"]) - 1, *q.shape[1:], q.shape[0], k.shape[0], *longest(inputs)])
    addresses = None if gradients is None else torch.tensor([t.data_ptr() for t in gradients])
    message = ctypes.create_string_buffer(512)
    library.rk_emulation_set_device(90, blocks)
    library.rk_emulation_set_seed(ctypes.c_uint64(order))
    status = library.rk_attention_sm90(
        *(address(views), address(inputs["cu_seqlens_q"]), address(inputs["cu_seqlens_k"])),
        *(address(inputs["key_mask"]), address(sizes), ctypes.c_double(inputs["scale"]), int(inputs["causal"])),
        *(int(q.dtype == BF16), ctypes.c_double(inputs["dropout_p"]), address(inputs["seed"])),
        *(address(out), address(lse), address(addresses), message),
    )
    assert status == 0, message.value.decode() or "not supported"


def forward(library: ctypes.CDLL, inputs: dict[str, Any], *, blocks: int = 3, order: int = 1) -> tuple[Tensor, Tensor]:
    q = inputs["q"]
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), math.nan)
    call(library, inputs, out, lse, None, blocks=blocks, order=order)
    return out, lse


def backward(
    library: ctypes.CDLL, inputs: dict[str, Any], out: Tensor, lse: Tensor, *, blocks: int = 3, order: int = 1
) -> list[Tensor]:
    """Gradients of q, k and v."""
    gradients = [torch.full(inputs[name].shape, math.nan, dtype=out.dtype) for name in "qkv"]
    statistics = torch.full((*lse.shape, 2), math.nan)
    call(library, inputs, out, lse, [*gradients, statistics], blocks=blocks, order=order)
    return gradients


def draw(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    total_q, keys = sum(case.lengths), case.keys if case.keys is not None else case.lengths
    total_k = sum(keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if case.keys is None and not case.contiguous:
        # NaN before and after: rows of the tensor that are not rows of the batch.
        room = torch.full((total_q + 5, 3, case.heads, case.head_dim), math.nan, dtype=case.dtype)
        room[2 : 2 + total_q] = normal(total_q, 3, case.heads, case.head_dim).to(case.dtype)
        room[:, :2] *= case.spread
        q, k, v = room[2 : 2 + total_q].unbind(1)
    else:
        q, k, v = (normal(n, case.heads, case.head_dim).to(case.dtype) for n in (total_q, total_k, total_k))
    mask = None if case.mask is None else torch.rand(total_k, generator=generator) < case.mask
    if case.unseen is not None:
        mask = torch.ones(total_k, dtype=torch.bool)
        mask[slice(*case.unseen)] = False
    grad = normal(total_q, case.heads, case.head_dim).to(case.dtype)
    return {
        **{
            "q": q,
            "k": k,
            "v": v,
            "grad": grad,
            "cu_seqlens_q": cumulative(case.lengths),
            "cu_seqlens_k": cumulative(keys),
        },
        **{"scale": case.head_dim**-0.5 if case.scale is None else case.scale, "causal": case.causal},
        **{"key_mask": mask, "dropout_p": case.dropout_p},
        "seed": torch.randint(-(2**62), 2**62, (1,), generator=generator) if case.dropout_p else None,
    }


def exactly(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64."""
    q, k, v = (inputs[name].double() for name in "qkv")
    rest = [inputs[name] for name in ("scale", "causal", "key_mask", "dropout_p", "seed")]
    ends = (inputs["cu_seqlens_q"], inputs["cu_seqlens_k"])
    return reference.attention_forward(q, k, v, *ends, *longest(inputs), *rest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward(library: ctypes.CDLL, case: Case) -> None:
    inputs = draw(case)
    out, lse = forward(library, inputs, blocks=case.blocks)
    exact, exact_lse = exactly(inputs)
    if out.numel() == 0:
        return
    # Two roundings of the dtype: of the probabilities, which are averaged, and of the output.
    eps = torch.finfo(case.dtype).eps
    size = inputs["v"].double().abs().max().item() / (1.0 - case.dropout_p) if inputs["v"].numel() else 0.0
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps * size / 2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim <= 64], ids=lambda case: case.id)
def test_backward(library: ctypes.CDLL, case: Case) -> None:
    inputs = draw(case)
    out, lse = forward(library, inputs, blocks=case.blocks)
    got = backward(library, inputs, out, lse, blocks=case.blocks)
    q, k, v, grad = (inputs[name].double() for name in ("q", "k", "v", "grad"))
    rest = [inputs[name] for name in ("scale", "causal", "key_mask", "dropout_p", "seed")]
    ends = (inputs["cu_seqlens_q"], inputs["cu_seqlens_k"])
    *exact, _ = reference.attention_backward(grad, q, k, v, *exactly(inputs), *ends, *longest(inputs), *rest)
    eps = torch.finfo(case.dtype).eps
    # Roundings of the weights and of the result, 0.2 to 0.3 eps each (rms of a uniform distribution). A sharp softmax
    # leaves differences of weights that nearly cancel.
    roundings = 0.6 if case.spread == 1.0 else 2.0
    for name, ours, expected in zip("qkv", got, exact, strict=True):
        assert not ours.isnan().any(), name
        if ours.numel() == 0:
            continue
        error = ours.double() - expected
        floor = 0.1 * eps * abs(inputs["scale"])  # what is left where it should cancel to nothing
        assert error.square().mean().sqrt() <= roundings * eps * expected.square().mean().sqrt() + floor, name
        assert error.abs().max() <= 2 * roundings * eps * expected.abs().max() + 8 * floor, name


ORDERED = [
    Case("two-kernels", (97, 0, 700, 1, 64, 200), heads=2, causal=True, mask=0.9, dropout_p=0.1),
    Case("whole", (128, 0, 64, 97, 1, 65), heads=3, mask=0.9, dropout_p=0.1),
]


@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.id)
def test_the_order_of_threads_does_not_matter(library: ctypes.CDLL, case: Case) -> None:
    inputs = draw(case)
    first, lse = forward(library, inputs, blocks=3)
    gradients = backward(library, inputs, first, lse, blocks=3)
    for order in range(2, 5):
        again = forward(library, inputs, blocks=order, order=order)
        assert torch.equal(again[0], first)
        assert torch.equal(again[1], lse)
        for t, expected in zip(
            backward(library, inputs, first, lse, blocks=order, order=order), gradients, strict=True
        ):
            assert torch.equal(t, expected)


def test_up_to_128_keys_all_gradients_are_of_one_kernel(library: ctypes.CDLL) -> None:
    def launched(keys: int, **more: Any) -> int:
        inputs = draw(Case("", (9, keys), keys=(keys, 5), **more))
        out = torch.zeros_like(inputs["q"])
        lse = torch.zeros(out.shape[1], out.shape[0])
        library.rk_emulation_take_launches(None, ctypes.c_int64(0))
        backward(library, inputs, out, lse)
        return int(library.rk_emulation_take_launches(None, ctypes.c_int64(0)))

    library.rk_emulation_set_dry_run(1)
    try:
        assert [launched(keys) for keys in (1, 128, 129)] == [1, 1, 2]
        assert launched(128, causal=True) == 2
    finally:
        library.rk_emulation_set_dry_run(0)


FEW_QUERIES = [
    Case("head64", (16,) * 6, keys=(640,) * 6),
    Case("head128", (16,) * 6, keys=(384,) * 6, head_dim=128),
]


@pytest.mark.parametrize("case", FEW_QUERIES, ids=lambda case: case.id)
def test_a_warpgroup_that_had_no_tile_waits_for_its_own_phase(library: ctypes.CDLL, case: Case) -> None:
    """Its next chunk may come into a slot whose last load, which it had no part in, is still under way: by the parity
    of the barrier alone it would read that.
    """
    inputs = draw(case)
    exact, exact_lse = exactly(inputs)
    for order in range(1, 5):
        out, _ = forward(library, inputs, order=order)
        torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=0.03)
        if case.head_dim <= 64:
            backward(library, inputs, exact.to(case.dtype), exact_lse.float(), order=order)


def test_sequences_do_not_see_each_other(library: ctypes.CDLL) -> None:
    """A sequence between others that are all NaN: bitwise the same as alone."""
    lengths = (30, 97, 50)
    inputs = draw(Case("", lengths, heads=2, contiguous=True))
    alone = {**inputs, "cu_seqlens_q": cumulative((97,)), "cu_seqlens_k": cumulative((97,))}
    for name in ("q", "k", "v", "grad"):
        alone[name] = inputs[name][30:127].clone()
        inputs[name][:30] = inputs[name][127:] = math.nan
    out, lse = forward(library, inputs)
    expected, expected_lse = forward(library, alone)
    assert torch.equal(lse[:, 30:127], expected_lse)
    gradients = backward(library, inputs, out, lse)
    expected_gradients = backward(library, alone, expected, expected_lse)
    for ours, alone_ours in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        assert torch.equal(ours[30:127], alone_ours)
        assert ours[:30].isnan().all()
        assert ours[127:].isnan().all()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_mask(library: ctypes.CDLL, dropout_p: float) -> None:
    """Equal scores, and values that are a unit matrix, 64 keys at a time: the output tells which were kept."""
    from roberta_kernels.reference.philox import keep_mask

    lengths, heads = (70, 64), 2
    inputs = draw(Case("", lengths, heads=heads, dtype=FP16, contiguous=True, scale=0.0, dropout_p=dropout_p))
    for first in (0, 64):
        for name, sequence in (("a", slice(0, 70)), ("b", slice(70, 134))):
            v = torch.zeros(134, heads, 64, dtype=FP16)
            rows = torch.arange(sequence.stop - sequence.start)[first : first + 64]
            v[sequence.start + rows, :, rows - first] = 1.0
            out, _ = forward(library, {**inputs, "v": v})
            kept = keep_mask(
                torch.arange(sequence.start, sequence.stop), sequence.stop - sequence.start, torch.arange(heads),
                dropout_p, inputs["seed"],
            )  # fmt: skip
            got = out[sequence].transpose(0, 1)[..., : len(rows)] != 0
            assert torch.equal(got, kept[..., first : first + len(rows)]), name


SMALLER = [case for case in CASES if sum(case.lengths) <= 250]
PROCESSES = 4


@pytest.mark.full
@pytest.mark.parametrize("process", range(PROCESSES))
def test_under_the_sanitizers(process: int) -> None:
    """The smaller cases again, in processes that have the sanitizers in them."""
    library = build.library("sanitized", sources=SOURCES, name=NAME)
    environment = {**os.environ, **build.environment(library), "PYTHONPATH": str(build.ROOT)}
    environment.pop("ROBERTA_KERNELS_CUDA_EMULATION")
    command = [sys.executable, "-m", "tests.cuda_emulation.test_attention_sm90", str(library), str(process)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    for case in SMALLER[int(sys.argv[2]) :: PROCESSES]:
        test_forward(library, case)
        if case.head_dim <= 64:
            test_backward(library, case)
        print("ran", case.id, flush=True)


if __name__ == "__main__":
    main()
