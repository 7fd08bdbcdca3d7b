"""Patched models on a GPU, on each backend: outputs, losses and gradients keep the promise against the original."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from model_cases import Case, assert_promise, batches_for, build, patched

import roberta_kernels as rk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
CASES = [
    Case(head="masked_lm", dtype="bfloat16"),
    Case(head="masked_lm", dtype="float16", seed=1),
    Case(head="pooler", dtype="bfloat16", padded_rows="zeros", mask="left", seed=2),
    Case(head="single_label", dtype="float32", seed=3),
    Case(head="causal_lm", dtype="float32", padded_rows="zeros", seed=4),
    Case(head="span", dtype="bfloat16", mask="none", seed=5),
]


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}


def needs(backend: str) -> None:
    if not (status := rk.available_backends()[backend]):
        pytest.skip(f"backend {backend!r} is not available: {status.detail}")


@on_each_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.head}-{case.dtype}-{case.mask}-{case.padded_rows}")
def test_outputs_loss_and_every_gradient(backend: str, case: Case) -> None:
    needs(backend)
    original = build(case).cuda()
    ours = patched(original, padded_rows=case.padded_rows, backend=backend)
    options = {"use_cache": False} if case.head == "causal_lm" else {}
    batches = [on_gpu(inputs) for inputs in batches_for(case, original.config, count=8)]
    assert_promise(ours, original, batches, head=case.head, backward=True, what=case, **options)


@on_each_backend
@pytest.mark.parametrize("graphs", [False, True], ids=["as it comes", "graphs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
def test_inference(backend: str, mask: str, dtype: str, graphs: bool) -> None:
    """Without gradients: one op call on the CUDA kernels; and as graphs, recorded and replayed, after edits too."""
    needs(backend)
    case = Case(mask=mask, dtype=dtype, seed=6)
    original = build(case).cuda()
    ours = patched(original, backend=backend, cuda_graphs=graphs)
    batches = [on_gpu(inputs) for inputs in batches_for(case, original.config, count=6)]
    for _ in range(3):
        assert_promise(ours, original, batches, everywhere=True, what=case)
    replayed = ours._rk_state.graphs["replayed"]
    assert replayed >= len(batches) if graphs else replayed == 0
    for model in (original, ours):
        layer = model.encoder.layer[0]
        layer.output.dense.weight.data.mul_(1.5)
        layer.attention.output.dense.weight.data = layer.attention.output.dense.weight.data * -1.5
    for _ in range(3):
        assert_promise(ours, original, batches, everywhere=True, what=case)


@on_each_backend
def test_graphs_in_two_threads_on_two_streams(backend: str) -> None:
    """Buffers have one user at a time, on the host and on the device."""
    needs(backend)
    case = Case(mask="right", dtype="bfloat16", seed=6)
    ours = patched(build(case).cuda(), backend=backend, cuda_graphs=True)
    batches = [on_gpu(inputs) for inputs in batches_for(case, ours.config, count=6)]
    with torch.no_grad():
        want = [ours(**inputs).last_hidden_state for inputs in batches for _ in range(3)][2::3]
    torch.cuda.synchronize()

    def repeat(turn: int) -> list[bool]:
        found = []
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(60):
                at = (i + turn) % len(batches)
                out = ours(**batches[at]).last_hidden_state
                found.append(torch.allclose(out, want[at], rtol=0.05, atol=0.05))
        return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(repeat, range(2)))
    assert all(map(all, found))


@on_each_backend
def test_dropout_is_drawn_anew_and_repeats_with_its_seed(backend: str) -> None:
    needs(backend)
    case = dataclasses.replace(CASES[0], train=True, config={"hidden_dropout_prob": 0.2})
    model = patched(build(case).cuda().train(), backend=backend)
    inputs = on_gpu(batches_for(case, model.config, count=1)[0])
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@on_each_backend
def test_gradients_are_the_same_bits_every_time(backend: str) -> None:
    needs(backend)
    case = CASES[0]
    model = patched(build(case).cuda(), backend=backend)
    inputs = on_gpu(batches_for(case, model.config, count=1)[0])
    found = []
    for _ in range(3):
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
