"""Models that are wrapped, sharded or dispatched: DataParallel, DDP, FSDP2, tensor parallelism, accelerate's hooks, the
meta device.

What needs two processes runs in one pair of them, which this file is the program of: `python test_parallel.py rank
folder` runs every case and writes what went wrong.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_cases import Case, batch_for, batches_for, build, patched
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
CASE = Case(seed=4, head="single_label", config=SMALL, train=True)


def original_and_batch(case=CASE):
    original = build(case)
    return original, batch_for(case, original.config)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def reasons(report):
    return {reason.split(": ", 1)[1] for reason in report.fallbacks()}


# --- one process ----------------------------------------------------------------------------------------------------


def test_data_parallel():
    original, inputs = original_and_batch()
    ours = patched(original)
    report = rk.patch(ours)
    want = original(**inputs)
    for model in (nn.DataParallel(ours), nn.DataParallel(copy.deepcopy(ours))):
        got = model(**inputs)
        close(got.logits, want.logits)
        got.loss.backward()
    assert report.fallbacks() == {}
    # DataParallel makes a replica of each module for each GPU: a copy of its __dict__ under the same class.
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is type(ours)
    assert replica.forward.__self__ is replica


def dispatched(model, folder, blocks):
    """The model with accelerate's hooks: on whole blocks, one of them on disk; or on all that hold weights."""
    from accelerate import cpu_offload, dispatch_model

    if not blocks:
        return cpu_offload(model, execution_device="cpu")
    base = model.base_model_prefix
    places = {f"{base}.embeddings": "cpu", f"{base}.encoder.layer.0": "disk", f"{base}.encoder.layer.1": "cpu"}
    places |= {name: "cpu" for name, _ in model.named_children() if name != base}
    places |= {
        f"{base}.{name}": "cpu"
        for name, _ in model.base_model.named_children()
        if name not in ("embeddings", "encoder")
    }
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "every module"])
@pytest.mark.parametrize("first", ["patch", "dispatch"])
@pytest.mark.parametrize("family", ["roberta", "electra", "xmod"])
def test_device_map_hooks(family, first, blocks, tmp_path):
    original, inputs = original_and_batch(Case(seed=4, family=family, head="single_label", config=SMALL))
    ours = copy.deepcopy(original)
    report = rk.patch(ours) if first == "patch" else None
    ours = dispatched(ours, tmp_path, blocks)
    report = report or rk.patch(ours)
    assert report
    with torch.no_grad():
        got, want = ours(**inputs), original(**inputs)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    assert reasons(report) <= {
        "hooks on a module that fusing would skip",
        "an encoder or layer with code of its own",
        "LayerNorm is not a plain nn.LayerNorm",
        "an embedding table is not a plain nn.Embedding",
    }
    assert report.fallbacks()


@pytest.mark.parametrize("family", ["roberta", "bert", "ernie", "xmod"])
def test_meta_device(family):
    original, inputs = original_and_batch(Case(seed=4, family=family, head="single_label", config=SMALL))
    with torch.device("meta"):
        ours = type(original)(original.config).eval()
        assert rk.patch(ours)
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    ours.to_empty(device="cpu")
    ours.load_state_dict(original.state_dict())
    for name, buffer in original.named_buffers():
        ours.get_buffer(name).copy_(buffer)  # those that no state dict has
    report = rk.patch(ours)
    with torch.no_grad():
        close(ours(**inputs).logits, original(**inputs).logits)
    assert report.fallbacks() == {}


@pytest.mark.parametrize(
    "kwargs", [{}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"dtype": torch.float64}], ids=str
)
def test_from_pretrained_with_every_model_patched(kwargs, tmp_path):
    original, inputs = original_and_batch(Case(seed=4, head="single_label", config=SMALL))
    original.save_pretrained(tmp_path)
    with rk.patch_transformers():
        ours = type(original).from_pretrained(tmp_path, **kwargs)
    assert rk.is_patched(ours)
    report = rk.patch(ours)
    original.to(kwargs.get("dtype", torch.float32))
    with torch.no_grad():
        close(ours(**inputs).logits, original(**inputs).logits)
    assert report.fallbacks() == {}


# --- two processes --------------------------------------------------------------------------------------------------


def train(model, rank, steps=3):
    """Losses of a few steps on this rank's own batches, and the weights after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for inputs in batches_for(CASE, build(CASE).config, steps, first=steps * rank):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = [p.detach() for p in model.parameters()]
    return losses + [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]


def all_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def ddp(rank):
    want = train(nn.parallel.DistributedDataParallel(build(CASE)), rank)
    before, after = build(CASE), nn.parallel.DistributedDataParallel(build(CASE))
    reports = [rk.patch(before), rk.patch(after)]
    for model in (nn.parallel.DistributedDataParallel(before), after):
        all_close(train(model, rank), want)
    assert [report.fallbacks() for report in reports] == [{}, {}]


def sharded(model):
    for layer in model.base_model.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_patched_before(rank):
    want = train(sharded(build(CASE)), rank)
    ours = build(CASE)
    report = rk.patch(ours)
    sharded(ours)
    assert all(isinstance(layer, FSDPModule) for layer in ours.base_model.encoder.layer)
    all_close(train(ours, rank), want)
    assert report.fallbacks() == {}, report.fallbacks()
    assert report.padded() == {"hooks on a layer": 3}
    assert rk.is_patched(ours)
    with pytest.raises(RuntimeError, match="FSDPRobertaFor"):
        rk.unpatch(ours)


def fsdp_patched_after(rank):
    want = train(sharded(build(CASE)), rank)
    ours = sharded(build(CASE))
    report = rk.patch(ours)
    assert "FSDPRobertaLayer" in {left.original for left in report.left}
    all_close(train(ours, rank), want)
    assert reasons(report) == {"an encoder or layer with code of its own"}


def tensor_parallel(rank):
    original, inputs = original_and_batch()
    want = original(**inputs)
    for first in ("patch", "parallelize"):
        ours = copy.deepcopy(original)
        report = rk.patch(ours) if first == "patch" else None
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        column, row = ColwiseParallel(), RowwiseParallel()
        plan = {f"attention.self.{name}": column for name in ("query", "key", "value")}
        plan |= {"attention.output.dense": row, "intermediate.dense": column, "output.dense": row}
        for layer in ours.base_model.encoder.layer:
            parallelize_module(layer, mesh, plan)
        report = report or rk.patch(ours)
        got = ours(**inputs)
        close(got.logits, want.logits)
        got.loss.backward()
        assert reasons(report) == {"hooks on a module that fusing would skip"}


CASES = {f.__name__: f for f in (ddp, fsdp_patched_before, fsdp_patched_after, tensor_parallel)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Case -> what went wrong in each of the two processes, or None."""
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(Path(rk.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [result.get(name, "not reached") for result in results] for name in CASES}


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, two_processes):
    for error in two_processes[case]:
        assert error is None, error


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    results = {}
    for name, case in CASES.items():
        try:
            torch.manual_seed(0)
            case(rank)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
            break  # the other process may be waiting for this one
        dist.barrier()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
