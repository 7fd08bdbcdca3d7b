"""The epilogue of CUTLASS's Hopper kernel for gelu_ffn, in its register layout, against float64.

What comes from the mainloop is given; what leaves the epilogue is compared: bias, GELU, the auxiliary tensor, GELU's
gradient, column sums; at ragged edges, into outputs that were poisoned around and within.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from . import build

pytestmark = [
    pytest.mark.cuda_source,
    pytest.mark.skipif(build.missing() is not None, reason=f"the CUDA emulation: {build.missing()}"),
    pytest.mark.skipif(build.cuda_build.cutlass_include() is None, reason="needs CUTLASS's headers"),
]
POISON = 3.0e38
EXTREMES = (-1e38, -3e4, -90.0, -12.0, 12.0, 90.0, 3e4, 1e38)  # where a sigmoid is 0 or 1 in float32, or nearly
PARTIALS_OF_TILE, TILE = 4, 128  # csrc/cuda/gelu_ffn.h
BFLOAT16 = torch.bfloat16


class Call(ctypes.Structure):
    """As in gelu_ffn_sm90_epilogue.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "bias", "c", "d", "auxiliary", "partials")),
        *((name, ctypes.c_int64) for name in ("pitch", "rows", "columns", "tanh", "small", "faulty")),
    ]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library("plain", sources=[build.HERE / build.EPILOGUE], name="_epilogue.so")))


def run(library: ctypes.CDLL, **given: Tensor | int | None) -> None:
    library.rk_emulation_set_device(90, 4)
    fields = {name: t.data_ptr() if isinstance(t, Tensor) else t for name, t in given.items()}
    message = ctypes.create_string_buffer(512)
    assert library.rk_gelu_epilogue(ctypes.byref(Call(**fields)), message) == 0, message.value.decode()


def poisoned(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(what is written, the same with a row before and after it)."""
    room = torch.full((rows + 2, columns), POISON, dtype=BFLOAT16)
    return room[1:-1], room


def gelu(x: Tensor, tanh: bool) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")


def close(got: Tensor, exact: Tensor) -> bool:
    """To half a unit of bfloat16, and of float32 before it was rounded."""
    return bool(((got.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-6).all())


def outside_is_untouched(room: Tensor) -> bool:
    return bool((room[[0, -1]] == torch.tensor(POISON, dtype=BFLOAT16)).all())


def forward_is_right(library: ctypes.CDLL, rows: int, columns: int, **options: int) -> bool:
    generator = torch.Generator().manual_seed(rows + columns)
    sums = torch.randn(rows, columns, generator=generator) * 2
    sums[0, : len(EXTREMES)] = torch.tensor(EXTREMES)
    bias = torch.randn(columns, generator=generator).to(BFLOAT16)
    (d, room), (pre, pre_room) = poisoned(rows, columns), poisoned(rows, columns)
    saves = options.pop("saves", 1)
    run(library, sums=sums, bias=bias, d=d, auxiliary=pre if saves else None, rows=rows, columns=columns, **options)
    exact = sums.double() + bias.double()
    right = close(d, gelu(exact, bool(options.get("tanh", 0)))) and outside_is_untouched(room)
    written = close(pre, exact) if saves else bool((pre == torch.tensor(POISON, dtype=BFLOAT16)).all())
    return right and written and outside_is_untouched(pre_room)


@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize(("rows", "columns", "tanh", "saves"), [(128, 128, 0, 1), (200, 264, 0, 1), (65, 136, 1, 0)])
def test_forward(library: ctypes.CDLL, rows: int, columns: int, tanh: int, saves: int, small: int) -> None:
    assert forward_is_right(library, rows, columns, tanh=tanh, saves=saves, small=small)


def test_a_faulty_node_is_refused(library: ctypes.CDLL) -> None:
    """SwapsBias: each pair of neighbours has the other's bias."""
    assert forward_is_right(library, 64, 128, small=1)
    assert not forward_is_right(library, 64, 128, small=1, faulty=1)


@pytest.mark.parametrize(("rows", "columns", "tanh"), [(128, 128, 0), (200, 264, 0), (300, 136, 1)])
def test_backward(library: ctypes.CDLL, rows: int, columns: int, tanh: int) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    sums = torch.randn(rows, columns, generator=generator)
    pre = (torch.randn(rows, columns, generator=generator) * 2).to(BFLOAT16)
    (grad, grad_room), (activation, activation_room) = poisoned(rows, columns), poisoned(rows, columns)
    tiles, pitch = math.ceil(rows / TILE), math.ceil(columns / TILE) * TILE
    partials = torch.full((tiles * PARTIALS_OF_TILE + 1, pitch), math.nan)
    run(
        library,
        **{"sums": sums, "c": pre, "d": grad, "auxiliary": activation, "partials": partials},
        **{"pitch": pitch, "rows": rows, "columns": columns, "tanh": tanh},
    )
    x = pre.double().requires_grad_()
    value = gelu(x, bool(tanh))
    (slope,) = torch.autograd.grad(value.sum(), x)
    exact = sums.double() * slope
    assert close(grad, exact)
    assert close(activation, value.detach())
    assert outside_is_untouched(grad_room)
    assert outside_is_untouched(activation_room)
    assert partials[-1].isnan().all(), "beyond the last row of tiles"
    found = partials[:-1, :columns].double().sum(0)
    assert ((found - exact.sum(0)).abs() <= 1e-6 * exact.abs().sum(0)).all()
