"""The compiled CUDA library beside a CUDA build of torch, on a machine that need not have a GPU.

`make test-cuda-library` builds a wheel and runs this where it is installed. Kernels are not run: tensors are fake ones
that say they are on a GPU, so that what is checked is loading, registration, shapes, and what whole models call.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ptxas
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import roberta_kernels as rk
from roberta_kernels import backends, ops
from roberta_kernels.backends.choosing import NOT_IN_CUDA
from roberta_kernels.hf import fusable

cuda_build = ptxas.load_cuda_build()
LIBRARY = Path(rk.__file__).parent / "_cuda.so"
EXPECTED = os.environ.get("ROBERTA_KERNELS_CUDA") == "1"  # as for setup.py: then its absence is an error


def why_not() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build (make test-cuda-library brings a CUDA build)"
    if not LIBRARY.is_file():
        return f"the CUDA library was not built: {backends.build_report().get('cuda')}"
    return None


pytestmark = pytest.mark.skipif(not EXPECTED and why_not() is not None, reason=why_not() or "")
NAMES = sorted(name for name in backends.schemas() if not name.startswith(tuple(NOT_IN_CUDA)))
OPS = sorted(name.removesuffix("_forward") for name in NAMES if name.endswith("_forward"))


def test_what_is_tested_is_there() -> None:
    assert why_not() is None
    for name in ("cuda", "cpu"):
        assert backends.available_backends()[name], backends.available_backends()[name].detail
    print(f"built with torch {backends.build_report()['torch']}, loaded into torch {torch.__version__}")


# ------------------------------------------------------------------------------------------------ the file


def needed(library: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_it_depends_on_no_cuda_version_and_no_python() -> None:
    """One file for torch built for CUDA 12 and 13: the runtime is inside, the driver is asked for when it is used."""
    libraries = needed(LIBRARY)
    assert "libtorch_cuda.so" in libraries
    assert not [name for name in libraries if re.match(r"lib(cudart|cuda|nvrtc|cublas|python|torch_python)\b", name)]


@pytest.mark.skipif(ptxas.disassembler() is None, reason="needs cuobjdump (triton brings it)")
def test_it_holds_machine_code_for_every_architecture_that_the_report_names() -> None:
    tools = ptxas.disassembler()
    assert tools is not None
    found = subprocess.run([tools[0], "-lelf", LIBRARY], capture_output=True, text=True, check=True).stdout
    listed = cuda_build.parse_architectures(";".join(backends.build_report()["cuda_architectures"]))
    # An older cuobjdump leaves the letter of 90a out.
    assert {re.sub(r"\D", "", a) for a in re.findall(r"\.sm_(\w+)\.cubin", found)} == {str(a.number) for a in listed}


# ------------------------------------------------------------------------------------------------ the ops


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_cuda_kernel(name: str) -> None:
    qualified = f"roberta_kernels_cuda::{name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
    registered = str(getattr(backends.namespaces()["cuda"], name)._schema)
    assert registered.replace(" ", "") == f"roberta_kernels_cuda::{backends.schemas()[name]}".replace(" ", "")


def test_cpu_tensors_are_refused() -> None:
    x = torch.zeros(3, 8)
    with backends.backend("cuda"), pytest.raises(backends.BackendError, match="cuda"):
        ops.add_layer_norm(x, x, x[0], x[0], eps=1e-5)


class Called(TorchDispatchMode):
    """Notes every op of this package that is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace.startswith("roberta_kernels"):
            self.names.append(f"{function.namespace}::{function._schema.name.split('::')[1]}")
        return function(*args, **(kwargs or {}))


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of `out`, summed, for each leaf: what autograd's engine does, one node after another.

    The engine itself asks the driver for the device of every tensor, and needs a GPU for fake ones, too.
    """
    root = out.grad_fn
    assert root is not None
    users: dict[Any, int] = {}
    stack, seen = [root], {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                users[node] = users.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    incoming: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(out)}}
    names = {id(leaf): name for name, leaf in leaves.items()}
    found: dict[str, Tensor] = {}
    ready = [root]
    while ready:
        node = ready.pop()
        received = incoming.pop(node, {})
        if hasattr(node, "variable"):  # AccumulateGrad
            found[names[id(node.variable)]] = received[0]
            continue
        arguments = [received.get(i) for i in range(len(node._input_metadata))]
        following_nodes = [edge for edge in node.next_functions if edge[0] is not None]
        passed: Any = ()
        with torch.no_grad():
            if received and callable(node):  # a node of torch's own
                passed = node(*arguments)
                passed = passed if isinstance(passed, tuple) else (passed,)
                passed = [g for g, (following, _) in zip(passed, node.next_functions, strict=True) if following]
            elif received:  # of a Python function, which returns something for arguments that are no tensors, too
                passed = node.apply(*arguments)
                passed = [g for g, needed in zip(passed, node.needs_input_grad, strict=True) if needed]
        for (following, index), gradient in itertools.zip_longest(following_nodes, passed):
            users[following] -= 1
            if gradient is not None:
                slot = incoming.setdefault(following, {})
                gradient = gradient.sum_to_size(following._input_metadata[index].shape)  # undoes broadcasting
                slot[index] = slot[index] + gradient if index in slot else gradient
            if users[following] == 0:
                ready.append(following)
    return found


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode, backends.backend("cuda"):
        yield mode


def on_gpu(mode: FakeTensorMode, t: Tensor) -> Tensor:
    """A fake tensor like this one, on a GPU."""
    with unset_fake_temporarily():
        return FakeTensor(mode, torch.empty_like(t, device="meta"), torch.device("cuda", 0))


def sample(op: str, dtype: torch.dtype, tokens: int, dropout: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(what has a gradient, the other arguments) of a call of a public op."""

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_()

    seed = {"dropout_p": dropout, "seed": torch.empty(1, dtype=torch.int64, device="cuda")} if dropout else {}
    if op == "attention":
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        return {name: normal(tokens, 3, 64) for name in "qkv"}, {
            "cu_seqlens_q": cu_seqlens,
            "max_seqlen_q": 16,
            "key_mask": torch.empty(tokens, dtype=torch.bool, device="cuda"),
            **seed,
        }
    if op == "add_layer_norm":
        rows = {name: normal(tokens, 192) for name in ("x", "residual")}
        return rows | {name: normal(192) for name in ("weight", "bias", "x_bias")}, {"eps": 1e-5, **seed}
    if op == "gelu_ffn":
        return {
            "x": normal(tokens, 192),
            "w_in": normal(768, 192),
            "b_in": normal(768),
            "w_out": normal(192, 768),
            "b_out": normal(192),
        }, {}
    ids = {name: torch.empty(tokens, dtype=torch.int64, device="cuda") for name in ("input_ids", "position_ids")}
    tables = {
        f"{name}_embeddings": normal(rows, 192) for name, rows in (("word", 97), ("position", 66), ("token_type", 1))
    }
    affine = {name: normal(192) for name in ("weight", "bias")}
    return tables | affine, {**ids, "token_type_ids": None, "eps": 1e-5, "word_padding_idx": 1, **seed}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [0, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ops_on_fake_gpu_tensors(
    fake: FakeTensorMode, op: str, dtype: torch.dtype, tokens: int, dropout: float
) -> None:
    tensors, rest = sample(op, dtype, tokens, dropout)
    with Called() as called:
        out = getattr(ops, op)(**tensors, **rest)
        got = gradients(out, tensors)
    assert called.names == [f"roberta_kernels_cuda::{op}_forward", f"roberta_kernels_cuda::{op}_backward"]
    assert out.device.type == "cuda"
    assert out.dtype == dtype
    assert out.shape[0] == tokens
    for name, t in tensors.items():
        assert (got[name].shape, got[name].dtype, got[name].device) == (t.shape, t.dtype, t.device), name


# ------------------------------------------------------------------------------------------------ whole models

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 66,
    "num_labels": 3,
}
LAYER = ["attention", "add_layer_norm", "gelu_ffn", "add_layer_norm"]
FORWARD = [f"roberta_kernels_cuda::{op}_forward" for op in ["embedding_layer_norm", *LAYER, *LAYER]]
BACKWARD = [name.replace("forward", "backward") for name in reversed(FORWARD)]


def fake_model(mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> nn.Module:
    """A patched model whose weights are fake tensors on a GPU."""
    with unset_fake_temporarily():
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**CONFIG)).to(dtype)
        rk.patch(model, backend="cuda")  # which looks at what the modules compute, and needs numbers for it
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_gpu(mode, parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_gpu(mode, buffer)
    # Outside of torch.export a weight that is no plain tensor keeps its module from being fused: here, too, it is one.
    monkeypatch.setattr(fusable, "_plain", lambda tensor: isinstance(tensor, FakeTensor))
    return model


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    shape = (len(lengths), max(lengths))
    return {
        "input_ids": torch.empty(shape, dtype=torch.int64, device="cuda"),
        "attention_mask": torch.empty(shape, dtype=torch.int64, device="cuda"),
        "labels": torch.empty(shape[0], dtype=torch.int64, device="cuda"),
    }


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_on_fake_gpu_tensors(
    fake: FakeTensorMode,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    train: bool,
) -> None:
    """Forward and backward go through the CUDA library's ops, each as often as the model has such a part."""
    model = fake_model(fake, monkeypatch, dtype).train(train)
    with Called() as called:
        loss = model(**batch_of([17, 1, 9, 4])).loss
        forward = list(called.names)
        got = gradients(loss, dict(model.named_parameters()))
        backward = called.names[len(forward) :]
    assert forward == FORWARD
    assert backward == BACKWARD
    assert loss.device.type == "cuda"
    for name, parameter in model.named_parameters():
        assert (got[name].shape, got[name].dtype) == (parameter.shape, dtype), name


def test_exported_for_a_gpu(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for a machine with a GPU can be made on one without."""
    model = fake_model(fake, monkeypatch, torch.bfloat16).eval()
    inputs = batch_of([9, 5, 2])
    del inputs["labels"]
    program = torch.export.export(model, (), inputs, strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t.removesuffix(".default").replace(".", "::") for t in targets if "roberta_kernels" in t] == FORWARD
