"""The ops as torch sees them: schemas, fake functions, autograd, torch.compile, torch.export, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from roberta_kernels import backends, ops
from roberta_kernels.backends.choosing import NOT_IN_CUDA

from .cases import FLOAT32, FLOAT64, Draw, Served, assert_repeats, leaf, on_every_backend, output_and_gradients
from .samples import OPS, Sample, registered_calls, sample

on_each_namespace = on_every_backend(dtypes=[FLOAT32], every_isa=False)
each_op = pytest.mark.parametrize("op", OPS)
plain_or_full = pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every option"])


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def memory(t: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr()} if t.numel() else set()


@plain_or_full
@each_op
@on_each_namespace
def test_opcheck(served: Served, op: str, every_option: bool, draw: Draw) -> None:
    """torch's own check: the schema tells the truth, fake and real agree, autograd is in place, AOT traces it."""
    call = sample(op, draw, FLOAT32, every_option=every_option)
    for name, args in registered_calls(served, call, draw).items():
        torch.library.opcheck(getattr(served.kernels(), name), args)
    forward = registered_calls(served, call, draw)[f"{op}_forward"]
    learning = tuple(leaf(arg) if isinstance(arg, Tensor) else arg for arg in forward)
    torch.library.opcheck(getattr(served.kernels(), f"{op}_forward"), learning)


@on_each_namespace
def test_every_schema_is_defined_and_implemented(served: Served) -> None:
    kernels = served.kernels()
    assert len(backends.schemas()) == 2 * len(OPS)
    for name, schema in backends.schemas().items():
        registered = str(getattr(kernels, name)._schema)
        assert registered.replace(" ", "") == f"{kernels.namespace}::{schema}".replace(" ", "")


@pytest.mark.parametrize("tokens", [0, 1, 9])
@plain_or_full
@each_op
@on_each_namespace
def test_fake_tensors_are_like_the_real_ones(
    served: Served, op: str, every_option: bool, tokens: int, draw: Draw
) -> None:
    """Shapes, dtypes, strides: what tracing believes is what runs."""
    call = sample(op, draw, FLOAT32, tokens=tokens, every_option=every_option)
    for name, args in registered_calls(served, call, draw).items():
        kernel = getattr(served.kernels(), name)
        real = kernel(*args)
        with FakeTensorMode() as mode:
            fake = kernel(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
        for i, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert a.shape == b.shape, f"{name} [{i}]"
            assert a.dtype == b.dtype, f"{name} [{i}]"
            assert a.device == b.device, f"{name} [{i}]"
            if a.numel():
                assert a.stride() == b.stride(), f"{name} [{i}]"


@plain_or_full
@each_op
@on_each_namespace
def test_outputs_have_memory_of_their_own(served: Served, op: str, every_option: bool, draw: Draw) -> None:
    call = sample(op, draw, FLOAT32, tokens=1, every_option=every_option)
    for name, args in registered_calls(served, call, draw).items():
        before = [t.clone() for t in tensors_of(args)]
        outputs = getattr(served.kernels(), name)(*args)
        taken = set().union(*(memory(t) for t in tensors_of(args)))
        for i, out in enumerate(outputs):
            assert not memory(out) & taken, f"{name} [{i}]"
            taken |= memory(out)
        for was, now in zip(before, tensors_of(args), strict=True):
            assert torch.equal(was, now), f"{name} wrote into an input"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@plain_or_full
@each_op
@on_every_backend()
def test_without_gradients_bitwise_the_same(served: Served, op: str, every_option: bool, mode: Any, draw: Draw) -> None:
    call = sample(op, draw, served.dtype, every_option=every_option)
    with_gradients = call(**{name: leaf(t) for name, t in call.tensors.items()})
    assert with_gradients.requires_grad
    with mode():
        without = call(**{name: leaf(t) for name, t in call.tensors.items()})
    assert not without.requires_grad
    assert torch.equal(with_gradients, without)
    assert torch.equal(with_gradients, call())  # nothing asks for a gradient


@each_op
@on_each_namespace
def test_what_is_saved_for_backward_has_no_gradient(served: Served, op: str, draw: Draw) -> None:
    """lse, mean, rstd and the pre-activation: backward has no formula for them, so none may be asked of them."""
    forward = registered_calls(served, sample(op, draw, FLOAT32, every_option=True), draw)[f"{op}_forward"]
    learning = (leaf(arg) if isinstance(arg, Tensor) else arg for arg in forward)
    out, *saved = getattr(served.kernels(), f"{op}_forward")(*learning)
    assert out.requires_grad
    assert not any(t.requires_grad for t in saved)


@each_op
@on_each_namespace
def test_a_gradient_for_one_input_alone(served: Served, op: str, draw: Draw) -> None:
    """Whichever input it is, it gets what it gets when all ask."""
    call = sample(op, draw, FLOAT32, every_option=True)
    grad = torch.randn_like(call())
    every = output_and_gradients(call, call.tensors, grad)
    for name, t in call.tensors.items():
        one = output_and_gradients(call, {name: t}, grad)
        assert torch.equal(one[f"gradient of {name}"], every[f"gradient of {name}"]), name


@plain_or_full
@each_op
def test_gradcheck(op: str, every_option: bool, draw: Draw) -> None:
    """The reference's gradients against finite differences, in float64."""
    with backends.backend("reference"):
        call = sample(op, draw, FLOAT64, tokens=5, every_option=every_option)
        names = list(call.tensors)
        if "word_padding_idx" in call.rest:  # the gradient of a padding row is zero by contract, not by calculus
            for table in ("word", "position"):
                ids = "input_ids" if table == "word" else "position_ids"
                call.rest[ids] = torch.where(call.rest[ids] == 1, 2, call.rest[ids])
        assert torch.autograd.gradcheck(
            lambda *values: call(**dict(zip(names, values, strict=True))),
            [leaf(t) for t in call.tensors.values()],
            fast_mode=True,
        )


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"dropout_p": 0.4}, {"key_mask": True}, {"scale": 2.0}, {"bias": True}, {}]
)
def test_gradcheck_attention_options(options: dict[str, Any], draw: Draw) -> None:
    with backends.backend("reference"):
        call = sample("attention", draw, FLOAT64, tokens=7)
        if options.get("key_mask"):
            options = {"key_mask": torch.tensor([True, False, True, True, False, True, True], device=draw.device)}
        if "dropout_p" in options:
            options = {**options, "seed": draw.seed()}
        if options.get("bias"):
            options = {"bias": draw.normal(2, 5, 6, dtype=FLOAT64)}
            call.tensors |= options
        call.rest |= {name: value for name, value in options.items() if name not in call.tensors}
        assert torch.autograd.gradcheck(
            lambda *values: call(**dict(zip(call.tensors, values, strict=True))),
            [leaf(t) for t in call.tensors.values()],
            fast_mode=True,
        )


@each_op
def test_float64_runs_in_float64(op: str, draw: Draw) -> None:
    """The reference is the oracle: nothing on the way may be float32."""
    with backends.backend("reference"):
        call = sample(op, draw, FLOAT64)
        single = Sample(call.function, {name: t.to(FLOAT32) for name, t in call.tensors.items()}, call.rest)
        difference = (call() - single().double()).abs().max()
        assert 0 < float(difference) < 1e-4
        again = call(**{name: t * (1 + 1e-12) for name, t in call.tensors.items()})
        assert 0 < float((again - call()).abs().max()) < 1e-9


# --------------------------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_op
@on_each_namespace
def test_compile(served: Served, op: str, dynamic: bool, draw: Draw) -> None:
    """Whole graph, forward and backward, bitwise as eager; with dynamic shapes one compilation for all token counts."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, op), backend=counter, fullgraph=True, dynamic=dynamic)
    sizes = (9, 14) if dynamic else (9,)
    compilations = []
    for tokens in sizes:
        call = sample(op, draw, FLOAT32, tokens=tokens, every_option=True)
        if op == "linear_cross_entropy":  # whose ignored rows are left out of products, but in a graph
            call.rest["labels"].clamp_(min=0)
        grad = torch.randn_like(call())
        expected = output_and_gradients(call, call.tensors, grad)
        got = output_and_gradients(Sample(compiled, call.tensors, call.rest), call.tensors, grad)
        for name, t in expected.items():
            assert torch.equal(got[name], t), f"{name}, {tokens} tokens"
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1], "another token count was compiled again"


@on_each_namespace
def test_compiled_graph_holds_the_op_of_the_backend(served: Served, draw: Draw) -> None:
    """What torch.compile sees is the op of the namespace that runs, and another backend is another graph."""
    torch._dynamo.reset()
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    call = sample("add_layer_norm", draw, FLOAT32)
    compiled = torch.compile(ops.add_layer_norm, backend=record, fullgraph=True)
    for name in (served.backend, "reference", served.backend):
        with backends.backend(name):
            compiled(**call.tensors, **call.rest)
            assert torch.equal(compiled(**call.tensors, **call.rest), call())
    names = [name for name in seen if name.startswith("roberta_kernels_")]
    expected = {f"roberta_kernels_{name}.add_layer_norm_forward.default" for name in (served.backend, "reference")}
    assert set(names) == expected
    assert len(names) == len(expected), "nothing was compiled twice"


class Block(torch.nn.Module):
    """Embeddings, attention and feed-forward of one small layer, in the package's ops."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        for op in OPS:
            for name, t in sample(op, draw, FLOAT32).tensors.items():
                if op != "attention":
                    self.register_buffer(f"{op}_{name}", t)

    def forward(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, x: Tensor) -> Tensor:
        hidden = ops.embedding_layer_norm(
            *(input_ids, position_ids, None),
            *(
                getattr(self, f"embedding_layer_norm_{table}_embeddings")
                for table in ("word", "position", "token_type")
            ),
            *(self.embedding_layer_norm_weight, self.embedding_layer_norm_bias),
            eps=1e-5,
        )
        q, k, v = hidden[:, None, :2, None].expand(-1, 3, -1, 16).contiguous().unbind(1)  # two heads
        attended = ops.attention(q, k, v, cu_seqlens, max_seqlen_q=16).mean(-1).repeat(1, 12)
        normed = ops.add_layer_norm(
            attended, hidden, self.add_layer_norm_weight, self.add_layer_norm_bias, eps=1e-5
        )  # [T, 24]
        out = ops.gelu_ffn(x + normed[:, :16], self.gelu_ffn_w_in, self.gelu_ffn_b_in, self.gelu_ffn_w_out)
        if backends.current_backend() == "cuda":  # which has no more
            return out
        loss = ops.linear_cross_entropy(
            normed, self.linear_cross_entropy_weight, input_ids, ignore_index=3, reduction="none"
        )
        largest = ops.linear_log1p_max(normed, self.linear_log1p_max_weight, cu_seqlens)
        return torch.cat([out, loss[:, None] + largest.sum()], -1)


@on_each_namespace
def test_export(served: Served, draw: Draw) -> None:
    """Exported once, the graph holds all ops and runs at other token counts."""
    module = Block(draw).to(served.device)

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        cu_seqlens = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=served.device)
        ids = draw.integers(0, 11, tokens), draw.integers(0, 13, tokens)
        return (*ids, cu_seqlens, draw.normal(tokens, 16, dtype=FLOAT32))

    tokens = torch.export.Dim("tokens", min=2, max=32)
    exported = torch.export.export(
        module, inputs(9), dynamic_shapes=({0: tokens}, {0: tokens}, None, {0: tokens}), strict=False
    )
    targets = {str(node.target) for node in exported.graph.nodes}
    here = set(OPS) - NOT_IN_CUDA if served.backend == "cuda" else OPS
    assert {f"roberta_kernels_{served.backend}.{op}_forward.default" for op in here} <= targets
    for count in (9, 16, 4):
        args = inputs(count)
        assert_repeats(exported.module()(*args), module(*args), served.backend)


@each_op
@on_each_namespace
def test_vmap_is_right_or_refused(served: Served, op: str, draw: Draw) -> None:
    call = sample(op, draw, FLOAT32)
    name, t = next(iter(call.tensors.items()))
    batch = torch.stack([t, t * 0.5, t + 1.0])
    expected = torch.stack([call(**{name: one}) for one in batch])
    for mode in (torch.enable_grad, torch.no_grad):
        try:
            with mode():
                got = torch.vmap(lambda t: call(**{name: t}))(batch)
        except (RuntimeError, ValueError, NotImplementedError):
            continue
        torch.testing.assert_close(got, expected)


def test_every_namespace_is_registered() -> None:
    """Also those that cannot run here: a graph traced elsewhere must load."""
    for kernels in backends.namespaces().values():
        for op in OPS:
            call = getattr(kernels, f"{op}_forward")
            assert torch._C._dispatch_has_kernel_for_dispatch_key(call.name(), "Autograd")
            assert torch._library.simple_registry.singleton.find(call.name()).fake_impl.kernel is not None
