"""The host code of the CUDA library: what its bindings refuse, and what they launch, up to sizes past 2^31.

    python tests/cuda_emulation/build.py --plain -- python -m pytest tests/cuda_emulation/test_launches.py

Launches are checked by the emulation (the limits of a grid, a block and shared memory on each architecture), and at
large sizes recorded without running: a dry run, on tensors that are address space and nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.backends.choosing import NOT_IN_CUDA

pytestmark = [
    pytest.mark.cuda_source,
    pytest.mark.skipif(not backends.emulating(), reason="runs on the emulation (see the head of this file)"),
]

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ARCHITECTURES = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148}  # and their multiprocessors
NAMES = sorted(name for name in backends.schemas() if not name.startswith(tuple(NOT_IN_CUDA)))
INT_MAX = 2**31 - 1

Make = Callable[..., Tensor]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[backends.EMULATION_VARIABLE])


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def on_device(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[int]:
    """Launches are planned for a GPU of each architecture."""
    library.rk_emulation_set_device(request.param, ARCHITECTURES[request.param])
    yield request.param
    library.rk_emulation_set_device(80, 4)


@pytest.fixture
def launches(library: ctypes.CDLL) -> Iterator[Callable[[], list[tuple[int, ...]]]]:
    """A dry run; calling it gives (grid x, y, z, block x, y, z, shared bytes) of each launch since the last time."""
    room = (ctypes.c_int64 * (7 * 64))()

    def take() -> list[tuple[int, ...]]:
        count = library.rk_emulation_take_launches(room, ctypes.c_int64(64))
        assert count <= 64
        return [tuple(room[7 * i : 7 * i + 7]) for i in range(count)]

    discard = ctypes.c_int64(0)  # what earlier tests launched, however much that was
    library.rk_emulation_take_launches(room, discard)
    library.rk_emulation_set_dry_run(1)
    yield take
    library.rk_emulation_set_dry_run(0)


# ------------------------------------------------------------------------------------------------ calls


def real(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.ones(shape, dtype=torch.bool) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)


def vast(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    """A tensor of any size: address space that nothing may touch, so that no memory stands behind it."""
    count = max(1, torch.Size(shape).numel())
    no_reserve = 0x4000  # MAP_NORESERVE, which Python's mmap has no name for before 3.11
    space = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(space, dtype=dtype, count=count)[: torch.Size(shape).numel()].view(shape)


def call(
    name: str,
    make: Make = real,
    *,
    dtype: torch.dtype = FLOAT32,
    tokens: int = 9,
    width: int = 64,
    inner: int = 96,
    heads: int = 2,
    sequences: int = 2,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """The arguments of an op of schemas.def, by name. width: the hidden size, or the head dim of attention."""
    rows = {key: make(tokens, width, dtype=dtype) for key in ("x", "residual", "grad_out")}
    vectors = {key: make(width, dtype=dtype) for key in ("weight", "bias", "x_bias")}
    statistics = {key: make(tokens, dtype=FLOAT32) for key in ("mean", "rstd")}
    common = {"eps": 1e-5, "dropout_p": dropout_p, "seed": real(1, dtype=torch.int64) if dropout_p else None}
    if name.startswith("attention"):
        # A sequence for the first tokens and one for the rest, others empty; what is vast is not read.
        ends = torch.zeros(sequences + 1, dtype=torch.int32)
        if sequences > 0:
            ends[1:] = tokens
            ends[1] = tokens // 3 if sequences > 1 else tokens
        longest = tokens - tokens // 3 if max_seqlen is None else max_seqlen
        given = {key: make(tokens, heads, width, dtype=dtype) for key in ("q", "k", "v", "out", "grad_out")}
        given |= {"lse": make(heads, tokens, dtype=FLOAT32), "key_mask": make(tokens, dtype=torch.bool)}
        given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends.clone(), "max_seqlen_q": longest, "max_seqlen_k": longest}
        given |= {"scale": 0.125, "causal": False, "bias": None}  # which it refuses
    elif name.startswith("add_layer_norm"):
        given = rows | vectors | statistics
    elif name.startswith("gelu_ffn"):
        given = rows | {"w_in": make(inner, width, dtype=dtype), "b_in": make(inner, dtype=dtype)}
        given |= {"w_out": make(width, inner, dtype=dtype), "b_out": make(width, dtype=dtype)}
        given |= {"preactivation": make(tokens, inner, dtype=dtype), "tanh": False, "save_preactivation": True}
    else:
        given = rows | vectors | statistics
        given |= {f"{key}_ids": make(tokens, dtype=torch.int64) for key in ("input", "position", "token_type")}
        for key, size in (("word", 11), ("position", 13), ("token_type", 2)):
            given[f"{key}_embeddings"] = make(size, width, dtype=dtype)
        given |= {"word_padding_idx": 1, "position_padding_idx": 1}
    wanted = [argument.name for argument in op_of(name)._schema.arguments]
    return {key: (given | common)[key] for key in wanted}


def op_of(name: str) -> Any:
    return getattr(torch.ops.roberta_kernels_cuda, name).default


def run(name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Past the dispatcher's choice: tensors that are not all on one device reach the binding, as CUDA ones would."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return op_of(name).redispatch(keys, *arguments.values())


# ------------------------------------------------------------------------------------------------ refusals

FIRST = {"attention": "q", "add_layer_norm": "x", "gelu_ffn": "x", "embedding_layer_norm": "word_embeddings"}


def tensors_of(name: str) -> list[str]:
    if not backends.emulating():
        return []
    given = call(name, dropout_p=0.25)
    return [a.name for a in op_of(name)._schema.arguments if isinstance(given[a.name], Tensor)]


EACH_TENSOR = [(name, argument) for name in NAMES for argument in tensors_of(name)]


def first_of(name: str) -> str:
    return FIRST[name.rsplit("_", 1)[0]]


@pytest.mark.parametrize("name", NAMES)
def test_the_good_calls_are_good(name: str) -> None:
    """Else the refusals below would prove nothing."""
    for out in run(name, call(name, dropout_p=0.25)):
        assert out.isfinite().all()


def refused(name: str, arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(name, arguments)
    message = str(caught.value).splitlines()[0]
    assert name.rsplit("_", 1)[0] in message
    assert any(f" {one} " in f" {message} ".replace(",", " ").replace(":", " ") for one in names.split("|")), message


@pytest.mark.parametrize(("name", "argument"), EACH_TENSOR)
def test_a_tensor_of_another_dtype(name: str, argument: str) -> None:
    for dtype in (torch.float64, torch.int16, torch.complex64):
        arguments = call(name, dropout_p=0.25)
        arguments[argument] = arguments[argument].to(dtype)
        refused(name, arguments, argument)


@pytest.mark.parametrize(("name", "argument"), EACH_TENSOR)
def test_a_tensor_of_another_shape(name: str, argument: str) -> None:
    """One more row, one more dimension. What is wrong in the first is found in those that are measured by it."""
    measures = (first_of(name), "k", "w_in", "w_out", "input_ids")
    names = "|".join(tensors_of(name)) if argument in measures else argument
    if argument.startswith("cu_seqlens"):
        names = "cu_seqlens_q|cu_seqlens_k"
    elif argument.endswith("_embeddings"):  # one check for the rank of all three
        names += "|tables"
    changes = [lambda t: torch.cat([t, t[:1]]), lambda t: t[None], lambda t: t[..., 0]]
    if (name, argument) in (("attention_forward", "q"), ("gelu_ffn_forward", "x")) or argument.endswith("_embeddings"):
        del changes[0]  # one more row there is another good call
    for change in changes:
        arguments = call(name, dropout_p=0.25)
        arguments[argument] = change(arguments[argument])
        refused(name, arguments, names)
        if argument == "seed":  # one element is one element
            break


@pytest.mark.parametrize(("name", "argument"), EACH_TENSOR)
def test_a_tensor_on_another_device(name: str, argument: str) -> None:
    arguments = call(name, dropout_p=0.25)
    arguments[argument] = arguments[argument].to("meta")
    refused(name, arguments, "|".join(tensors_of(name)) if argument == first_of(name) else argument)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gelu_ffn")])
def test_dropout(name: str) -> None:
    for p in (1.0, -0.1, 2.0, float("nan")):
        refused(name, call(name, dropout_p=0.25) | {"dropout_p": p}, "dropout_p")
    refused(name, call(name, dropout_p=0.25) | {"seed": None}, "seed")
    refused(name, call(name, dropout_p=0.25) | {"seed": torch.zeros(2, dtype=torch.int64)}, "seed")


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_what_attention_refuses(name: str) -> None:
    refused(name, call(name) | {"bias": torch.zeros(2, 99, 99)}, "bias")
    for width in (8, 12, 20, 136, 256):
        refused(name, call(name, width=width), "head_dim")
    for argument in ("q", "k", "v"):
        arguments = call(name)
        arguments[argument] = arguments[argument].transpose(1, 2).contiguous().transpose(1, 2)
        refused(name, arguments, argument)
    refused(name, call(name) | {"max_seqlen_q": -1}, "max_seqlen_q")
    refused(name, call(name) | {"max_seqlen_k": -1}, "max_seqlen_k")
    none = {"cu_seqlens_q": torch.zeros(1, dtype=torch.int32), "cu_seqlens_k": torch.zeros(1, dtype=torch.int32)}
    refused(name, call(name) | none, "sequences")
    refused(name, call(name) | {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q")


# ------------------------------------------------------------------------------------------------ launches


def shapes_like(name: str, outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
    """Every output is as large as what it belongs to."""
    for out, returned in zip(outputs, op_of(name)._schema.returns, strict=True):
        like = arguments.get(returned.name.removeprefix("grad_"))
        if returned.name.startswith("grad_") and like is not None and out.numel():
            assert out.shape == like.shape, returned.name


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(on_device: int, name: str, dtype: torch.dtype) -> None:
    """T = 0: empty outputs, and gradients of what every token shares that are 0, not what was in memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is allocated is filled with NaN
    try:
        arguments = call(name, dtype=dtype, tokens=0, dropout_p=0.25)
        outputs = run(name, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    shapes_like(name, outputs, arguments)
    for out in outputs:
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_no_sequences(on_device: int, name: str) -> None:
    outputs = run(name, call(name, tokens=0, sequences=0))
    assert all(out.numel() == 0 for out in outputs)


def within_limits(found: list[tuple[int, ...]]) -> None:
    assert found
    for grid_x, grid_y, grid_z, x, y, z, _ in found:
        assert 1 <= grid_x <= INT_MAX
        assert 1 <= grid_y <= 65535
        assert 1 <= grid_z <= 65535
        assert 1 <= x * y * z <= 1024
        assert x * y * z % 32 == 0


ROWS = [name for name in NAMES if "layer_norm" in name]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "width"),
    [
        (1, 1),
        (1, 768),
        (1, 2**20),
        (2**31 // 768 + 1, 768),  # elements just past 2^31
        (2**31 // 1024, 1024),  # and just 2^31
        (2**32 // 1024 + 1, 1024),
        (70000, 2048),  # rows that wait in shared memory: the widest of each layout
        (70000, 4096),
        (70000, 8192),
        (2**31 // 8 + 1, 8),
        (2**31 - 1, 1),  # and rows
        (2**31 + 5, 1),
    ],
)
@pytest.mark.parametrize("name", ROWS)
def test_rows(on_device: int, launches: Any, name: str, tokens: int, width: int, dtype: torch.dtype) -> None:
    if name == "embedding_layer_norm_backward" and tokens > 2**23:
        pytest.skip("its ids are sorted by torch, also in a dry run")
    arguments = call(name, vast, dtype=dtype, tokens=tokens, width=width, dropout_p=0.25)
    shapes_like(name, run(name, arguments), arguments)
    within_limits(launches())


ATTENTION = [name for name in NAMES if name.startswith("attention")]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 72, 128])
@pytest.mark.parametrize(
    ("tokens", "sequences", "max_seqlen", "heads"),
    [
        (1, 1, 1, 1),
        (1, 70000, 1, 1),  # sequences without a token, more of them than a grid has rows
        (8192, 1, 8192, 12),
        (2**17, 1, 2**17, 16),
        (2**31 // (12 * 64) + 1, 2, 2**21, 12),  # elements just past 2^31
        (2**22, 8192, 512, 16),
        (1000, 2**20, 1, 2100),  # more (sequence, head) pairs than a grid has blocks
        (100, 10, 2**31 - 1, 1),  # an upper bound of the lengths that bounds nothing
    ],
)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(
    on_device: int,
    launches: Any,
    name: str,
    tokens: int,
    sequences: int,
    max_seqlen: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    if tokens * heads * width * dtype.itemsize > 2**34:
        pytest.skip("each output would be more than 16 GiB of address space")
    sizes = {"sequences": sequences, "max_seqlen": max_seqlen, "heads": heads}
    arguments = call(name, vast, dtype=dtype, tokens=tokens, width=width, dropout_p=0.25, **sizes)
    shapes_like(name, run(name, arguments), arguments)
    within_limits(launches())


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "inner"),
    [(1, 1), (1, 3072), (2**31 // 3072 + 1, 3072), (2**32 // 4096 + 1, 4096), (2**28 + 1, 8), (2**31 + 5, 1)],
)
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gelu_ffn")])
def test_gelu_ffn(on_device: int, launches: Any, name: str, tokens: int, inner: int, dtype: torch.dtype) -> None:
    """A width of 1: the products are torch's affair, and left out of a dry run."""
    arguments = call(name, vast, dtype=dtype, tokens=tokens, width=1, inner=inner)
    shapes_like(name, run(name, arguments), arguments)
    within_limits(launches())


# ------------------------------------------------------------------------------------------------ plans that run


@pytest.mark.parametrize("multiprocessors", [1, 3, 148])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_the_device_the_answer_is_right(
    on_device: int, library: ctypes.CDLL, name: str, dtype: torch.dtype, multiprocessors: int
) -> None:
    """Blocks that go on to further rows, tiles that fit less shared memory: each plan, run, against the reference."""
    library.rk_emulation_set_device(on_device, multiprocessors)
    torch.manual_seed(1)
    arguments = call(name, dtype=dtype, tokens=70, width=72, heads=1)
    if name.endswith("backward"):  # what forward saved
        forward = name.replace("backward", "forward")
        saved = getattr(torch.ops.roberta_kernels_reference, forward)(*call_like(forward, arguments, dtype).values())
        arguments |= {key: t for key, t in zip(SAVED[forward], saved, strict=True) if key in arguments}
    got = run(name, arguments)
    double = {key: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in arguments.items()}
    expected = getattr(torch.ops.roberta_kernels_reference, name)(*double.values())
    for returned, ours, exact in zip(op_of(name)._schema.returns, got, expected, strict=True):
        if ours.numel() == 0:
            continue
        scale = float(exact.abs().max().clamp_min(1e-3))
        tolerance = 1e-4 if ours.dtype == FLOAT32 and dtype == FLOAT32 else 2e-2
        torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=0, atol=tolerance, msg=returned.name)


SAVED = {
    "attention_forward": ("out", "lse"),
    "add_layer_norm_forward": ("out", "mean", "rstd"),
    "gelu_ffn_forward": ("out", "preactivation"),
    "embedding_layer_norm_forward": ("out", "mean", "rstd"),
}


def call_like(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call of forward with what the call of backward has."""
    return {
        key: arguments.get(key, value) for key, value in call(name, dtype=dtype, tokens=70, width=72, heads=1).items()
    }
