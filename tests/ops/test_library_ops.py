"""The ops that a compiled library has beside those of schemas.def: under FakeTensorMode as in truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from roberta_kernels import backends
from roberta_kernels.schemas import schemas

CPU = torch.ops.roberta_kernels_cpu
needs_cpu_kernels = pytest.mark.skipif(
    not backends.available_backends()["cpu"], reason="the compiled cpu kernels are not there"
)


def registered_ops() -> list[str]:
    """Every op of every namespace of ours in this process."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("roberta_kernels_"))


def overload(name: str) -> Any:
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op.split(".")[0]).default


def takes_tensors(op: Any) -> bool:
    return any("Tensor" in str(argument.type) for argument in op._schema.arguments)


def test_every_op_with_tensors_has_a_fake_function() -> None:
    """Whoever adds an op adds its fake function: in ops/ for those of schemas.def, else in library_ops.py."""
    ops = {name: overload(name) for name in registered_ops()}
    assert len(ops) >= len(backends.namespaces()) * len(schemas())
    without = [
        name
        for name, op in ops.items()
        if takes_tensors(op) and torch._library.simple_registry.singleton.find(name).fake_impl.kernel is None
    ]
    assert not without


@needs_cpu_kernels
def test_ops_without_tensors_answer_under_fake_tensors() -> None:
    isa, isas = backends.cpu_isa(), backends.cpu_isas()
    with FakeTensorMode():
        assert backends.cpu_isa() == isa
        assert backends.cpu_isas() == isas
        with backends.use_cpu_isa("portable"):
            assert backends.cpu_isa() == "portable"
    assert backends.cpu_isa() == isa


def arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Calls of each op of the CPU library that takes tensors and is none of schemas.def."""
    weights = [torch.randn(*shape) for shape in ((96, 32), (32, 32), (48, 32), (32, 48))]
    qkv, out, inner, outer = (CPU.pack_weight(weight, "float32") for weight in weights)
    b, f = torch.randn(32), torch.randn(48)
    layer = [qkv, b, b, b, out, b, b, b, inner, f, outer, b, b, b]
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    encoder = (torch.randn(7, 32), layer, ends, 4, None, False, 2, 0.25, 1e-5, False)
    packs = [(weight, kind) for weight in weights for kind in ("float32", "bfloat16", "int8", "int8-dynamic")]
    calls = {
        "roberta_kernels_cpu::pack_weight": packs,
        "roberta_kernels_cpu::packed_encoder": [encoder],
        "roberta_kernels_cpu::cached_attention": [
            (torch.randn(2, 3, 1, 16), *torch.randn(2, 2, 3, 5, 16), None, 0.25, False)
        ],
        "roberta_kernels_cpu::linear": [(encoder[0], weights[0], None)],
        "roberta_kernels_cpu::checksum_weights": [(weights, [0] * 4, [0] * 4, 3, 16)],
    }
    if hasattr(CPU, "encoder"):  # on the parameters themselves
        q, k, v = weights[0].chunk(3)
        in_place = [q, b, k, b, v, b, weights[1], b, b, b, weights[2], f, weights[3], b, b, b]
        calls["roberta_kernels_cpu::encoder"] = [(encoder[0], in_place, *encoder[2:])]
    return calls


@needs_cpu_kernels
def test_fakes_are_like_the_real_ones() -> None:
    calls = arguments()
    others = [
        name
        for name in registered_ops()
        if name.startswith("roberta_kernels_cpu::")
        and takes_tensors(overload(name))
        and name.partition("::")[2] not in schemas()
    ]
    assert sorted(calls) == others, "an op of the library that this test does not call"
    for name, every_call in calls.items():
        for args in every_call:
            real = overload(name)(*args)
            with FakeTensorMode() as mode:
                fake = overload(name)(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args))
            assert isinstance(fake, Tensor) == isinstance(real, Tensor), name
            if isinstance(real, Tensor):
                assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device), name
                assert fake.stride() == real.stride(), name
