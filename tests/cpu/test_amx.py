"""Products on tiles: with the twins of the tile instructions on any x86-64 machine, and with AMX where it is."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

from roberta_kernels import backends
from roberta_kernels.ops import gelu_ffn
from roberta_kernels.tolerance import assert_three_way

from .conftest import ISAS, has_amx
from .tile_library import address, build

FLOAT32_PARTS = pytest.mark.parametrize("parts", [1, 2, 3], ids=["one-part", "two-parts", "three-parts"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# What a product of parts may be off, of the sum of |w x|: rounding to 8 and to 16 bits; three parts are float32.
PART_ERROR = {1: 2.0**-8 + 2.0**-17, 2: 3 * 2.0**-17}
TINY = 2.0**-126

pytestmark = [
    pytest.mark.full,  # compiles
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which(os.environ.get("CXX", "g++")) is None,
        reason="needs a C++ compiler on x86-64 Linux",
    ),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    built = {}

    def get(kind):
        if kind == "hardware" and not has_amx():
            pytest.skip("this processor has no AMX")
        if kind not in built:
            compiler = os.environ.get("CXX", "g++")
            built[kind] = build(tmp_path_factory.mktemp(kind), compiler, twin=kind == "twin")
        built[kind].threads(2)
        return built[kind]

    return get


@pytest.fixture(params=["twin", "hardware"])
def tiles(request, libraries):
    return libraries(request.param)


@pytest.fixture
def both(libraries):
    return libraries("twin"), libraries("hardware")


def bits(t):
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def assert_same_bits(ours, theirs):
    """But for the sign and payload of NaNs."""
    nan = ours.isnan()
    assert torch.equal(nan, theirs.isnan())
    assert torch.equal(bits(ours)[~nan], bits(theirs)[~nan])


# ---- the instructions ----


def from_bits(signs, exponents, size):
    """bfloat16 numbers with these exponents (as stored)."""
    exponent = torch.tensor(exponents)[torch.randint(len(exponents), (size,))]
    sign = torch.randint(2, (size,)) if signs else torch.zeros(size, dtype=torch.long)
    word = (sign << 15) | (exponent << 7) | torch.randint(128, (size,))
    return torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16).view(torch.bfloat16)


OPERANDS = {
    "ordinary": list(range(117, 137)),
    "products-about-2^-126": list(range(54, 76)),
    "denormals": [0, 0, 1, 2, 127],
    "overflowing": list(range(180, 195)),
    "infinities-and-nans": [*range(120, 130), 255],
    "anything": list(range(256)),
}


@pytest.mark.parametrize("exponents", OPERANDS.values(), ids=OPERANDS)
def test_twin_of_bf16_product(both, exponents):
    twin, hardware = both
    for repeat in range(40):
        a, b = (from_bits(True, exponents, 512) for _ in range(2))
        c = from_bits(True, exponents, 256).float() * (repeat % 3 - 1)
        c += torch.randn(256) * c.abs() * 2.0**-9  # all 24 bits
        assert_same_bits(twin.dot(a, b, c), hardware.dot(a, b, c))


def test_twin_rounds_to_24_bits_before_it_takes_for_zero(both):
    """2^-126 - 2^-149 and its neighbours, of which some round up to 2^-126."""
    for below in range(148, 156):
        a, b = torch.zeros(16, 32, dtype=torch.bfloat16), torch.zeros(16, 32, dtype=torch.bfloat16)
        a[0, 0], b[0, 0] = 2.0**-63, 2.0**-63
        a[0, 2], b[1, 0] = -(2.0 ** -(below // 2)), 2.0 ** -(below - below // 2)
        results = [tiles.dot(a, b, torch.zeros(16, 16)) for tiles in both]
        assert_same_bits(*results)
        assert results[0][0, 0] == (0.0 if below <= 150 else TINY)


def random_tiles(rows=1024, columns=None):
    shape = (rows,) if columns is None else (rows, columns)
    return torch.randint(0, 256, shape, dtype=torch.uint8), torch.randint(-128, 128, shape, dtype=torch.int8)


def test_twin_of_int8_product(both):
    for _ in range(20):
        a, b = random_tiles()
        c = torch.randint(-(2**31), 2**31 - 1, (256,), dtype=torch.int32)
        twin, hardware = (tiles.dot(a, b, c) for tiles in both)
        assert torch.equal(twin, hardware)


def test_int8_product(tiles):
    a, b = random_tiles(16, 64)
    columns = b.view(16, 16, 4).permute(0, 2, 1).reshape(64, 16)
    c = torch.randint(-100, 100, (16, 16), dtype=torch.int32)
    assert torch.equal(tiles.dot(a, b, c), c + (a.long() @ columns.long()).int())


# ---- products of integers ----

WHOLE_SIZES = pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 64, 32), (1, 1, 1), (15, 63, 31), (16, 65, 33), (17, 130, 70), (33, 768, 96), (70, 200, 300), (100, 3072, 40)],
)


@WHOLE_SIZES
def test_integers_are_multiplied_exactly(tiles, rows, k, n):
    """Rows from 0 to 255 and weights from -127 to 127 are what they are rounded to, where both ends occur."""
    x, w = torch.randint(0, 256, (rows, k)).float(), torch.randint(-127, 128, (n, k)).float()
    w[:, 0] = 127.0
    x[:, 0] = 255.0
    if k > 1:
        x[:, -1] = 0.0
    assert torch.equal(tiles.whole(x, w), (x.long() @ w.long().T).float())


@WHOLE_SIZES
def test_rounded_products(tiles, rows, k, n):
    x, w = torch.randn(rows, k), torch.randn(n, k)
    exact = x.double() @ w.double().T
    steps = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255, w.abs().amax(1) / 127
    # Each element is off by half a step at most, or, of x, by a whole one: zero is rounded to an integer as well.
    bound = steps[0][:, None] * w.abs().sum(1) + (x.abs().sum(1)[:, None] + k * steps[0][:, None]) * steps[1] / 2
    assert bool(((tiles.whole(x, w).double() - exact).abs() <= 1.001 * bound + 1e-6).all())


@WHOLE_SIZES
def test_whole_rows_do_not_depend_on_their_batch(tiles, rows, k, n):
    x, w = torch.randn(rows, k), torch.randn(n, k)
    out = tiles.whole(x, w)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(tiles.whole(x[row : row + 1].contiguous(), w)[0], out[row])
    tiles.threads(1)
    assert torch.equal(tiles.whole(x, w), out)


def test_rows_with_a_nan_are_nan(tiles):
    x, w = torch.randn(20, 80), torch.randn(40, 80)
    x[3, 7], x[18, 0], w[5, 5] = torch.nan, torch.inf, -torch.inf
    found = tiles.whole(x, w).isnan()
    wanted = torch.zeros(20, 40, dtype=torch.bool)
    wanted[3] = wanted[18] = True
    wanted[:, 5] = True
    assert torch.equal(found, wanted)


# ---- products ----

SIZES = [(1, 1, 1), (5, 31, 33), (16, 64, 32), (17, 100, 97), (33, 32, 31), (40, 800, 70), (70, 1000, 48)]


def inputs(tokens, k_size, rows, dtype=torch.float32):
    x = torch.randn(tokens, k_size).to(dtype)
    return x, (torch.randn(rows, k_size) * k_size**-0.5).to(dtype), torch.randn(rows).to(dtype)


@DTYPES
@pytest.mark.parametrize(("tokens", "k_size", "rows"), SIZES)
def test_against_float64(tiles, tokens, k_size, rows, dtype):
    x, w, bias = inputs(tokens, k_size, rows, dtype)
    for b in (bias, None):
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert_three_way(tiles.project(x, [w], [b]), F.linear(x, w, b), exact)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("tokens", "k_size", "rows"), SIZES)
def test_fewer_parts(tiles, tokens, k_size, rows, parts):
    x, w, _ = inputs(tokens, k_size, rows)
    error = (tiles.project(x, [w], parts=parts) - F.linear(x.double(), w.double())).abs()
    size = F.linear(x.abs().double(), w.abs().double())
    assert (error <= (PART_ERROR[parts] + 2.0**-20) * size).all()
    # and no better than that: fewer parts are kept
    assert k_size < 100 or error.max() > PART_ERROR[parts] * size.max() * 2.0**-8


def test_three_parts_are_no_less_accurate_than_multiply_adds(tiles):
    """The largest error, of the largest value, at the sizes of a model."""
    for k_size in (768, 3072):
        x, w, _ = inputs(48, k_size, 64)
        exact = F.linear(x.double(), w.double())
        one_chain = torch.zeros(48, 64)
        for k in range(k_size):
            one_chain = torch.addcmul(one_chain, x[:, k, None], w[None, :, k])
        error, plain = ((ours - exact).abs().max() for ours in (tiles.project(x, [w]), one_chain))
        assert error < plain


@DTYPES
def test_three_weights_side_by_side(tiles, dtype):
    x = inputs(20, 40, 1, dtype)[0]
    weights, biases = zip(*(inputs(1, 40, rows, dtype)[1:] for rows in (33, 64, 7)), strict=True)
    together = tiles.project(x, list(weights), list(biases))
    alone = [tiles.project(x, [w], [b]) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(together, torch.cat(alone, 1))


@DTYPES
def test_rows_of_a_wider_weight(tiles, dtype):
    x, w, _ = inputs(20, 72, 40, dtype)
    wide = torch.full((40, 90), torch.nan, dtype=dtype)
    wide[:, :72] = w
    assert torch.equal(tiles.project(x, [wide[:, :72]]), tiles.project(x, [w]))


@DTYPES
@pytest.mark.parametrize("k_size", [50, 800])
def test_same_bits_alone_and_in_any_batch(tiles, k_size, dtype):
    x, w, bias = inputs(37, k_size, 70, dtype)
    tiles.threads(1)
    alone = torch.cat([tiles.project(row[None], [w], [bias]) for row in x])
    for threads in (1, 3):
        tiles.threads(threads)
        for tokens in (2, 17, 37):
            assert torch.equal(tiles.project(x[:tokens], [w], [bias]), alone[:tokens])
        assert torch.equal(tiles.project(x.flip(0).contiguous(), [w], [bias]), alone.flip(0))


@FLOAT32_PARTS
def test_infinities_and_nans(tiles, parts):
    """As in float32, and nowhere else."""
    x, w, _ = inputs(37, 900, 40)
    w = w + 0.01 * w.sign()  # no zeros, whose product with an infinity is NaN
    w[:, :8] = torch.tensor([1.0, -2.0, 0.5, 4.0, -1.0, 1.5, 3.0, -0.25])  # one part each
    clean = tiles.project(x, [w], parts=parts)
    x[1, 3], x[2, 5], x[3, 899], x[4, 1], x[20, 0], x[36, 2] = (
        math.inf,
        -math.inf,
        math.nan,
        math.inf,
        math.nan,
        math.inf,
    )
    x[4, 2] = -math.inf
    w[7, 700], w[39, 6], w[8, 1] = math.inf, math.nan, -math.inf
    exact, ours = F.linear(x.double(), w.double()), tiles.project(x, [w], parts=parts)
    strange = ~exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours[strange & ~exact.isnan()].double(), exact[strange & ~exact.isnan()])
    assert torch.equal(ours[~strange], clean[~strange])


def test_payload_in_the_lower_half_is_still_a_nan(tiles):
    x, w, _ = inputs(3, 40, 5)
    bits(x)[1, 7] = 0x7F800001
    for parts in (1, 2, 3):
        ours = tiles.project(x, [w], parts=parts)
        assert ours[1].isnan().all()
        assert ours[[0, 2]].isfinite().all()


@FLOAT32_PARTS
def test_largest_numbers(tiles, parts):
    """What 8 bits would round up to infinity stays finite."""
    largest = torch.finfo(torch.float32).max
    x, w = torch.full((3, 4), largest), torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0], [0.25, 0, 0, 0.25]])
    ours = tiles.project(x, [w], parts=parts).double()
    exact = F.linear(x.double(), w.double())
    assert ((ours - exact).abs() <= exact * {1: 2.0**-8, 2: 2.0**-16, 3: 2.0**-24}[parts]).all()


def test_denormals(tiles):
    """Numbers below 2^-126 count as zero, and so do the parts of small numbers and products: the bound of design.md."""
    scale = torch.logspace(-149, -100, 50, base=2.0)
    x, w, _ = inputs(50, 64, 40)
    for small, other in ((x * scale[:, None], w), (x, w * scale[:40, None]), (x * 2.0**-62, w * 2.0**-62)):
        exact = F.linear(small.double(), other.double())
        lost = 3 * TINY * (small.abs().sum(1)[:, None] + other.abs().sum(1)[None]) + 6 * 64 * TINY
        rounding = 2.0**-22 * F.linear(small.abs().double(), other.abs().double())
        assert ((tiles.project(small, [other]) - exact).abs() <= lost + rounding).all()


# ---- feed-forward ----


def feed_forward_inputs(tokens, hidden, inner, outer, dtype):
    shapes = ((tokens, hidden), (inner, hidden), (inner,), (outer, inner), (outer,))
    scales = (1.0, hidden**-0.5, 0.5, inner**-0.5, 0.5)
    return [(scale * torch.randn(shape)).to(dtype) for scale, shape in zip(scales, shapes, strict=True)]


def plain_feed_forward(x, w_in, b_in, w_out, b_out, tanh):
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh" if tanh else "none"), w_out, b_out)


FEED_FORWARD_SIZES = [(1, 1, 1, 1), (5, 33, 70, 40), (16, 64, 96, 64), (50, 40, 1000, 33), (33, 800, 31, 7)]


@DTYPES
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 33, 70, 40), (16, 64, 96, 64), (50, 40, 1000, 33), (33, 800, 31, 7)]
)
def test_feed_forward(tiles, sizes, tanh, dtype):
    operands = feed_forward_inputs(*sizes, dtype)
    out, preactivation = tiles.feed_forward(*operands, tanh, save=True)
    assert torch.equal(out, tiles.feed_forward(*operands, tanh)[0])
    exact = [t.double() for t in operands]
    assert_three_way(out, plain_feed_forward(*operands, tanh), plain_feed_forward(*exact, tanh))
    assert_three_way(preactivation, F.linear(*operands[:3]), F.linear(*exact[:3]))


@FLOAT32_PARTS
def test_feed_forward_of_special_numbers(tiles, parts):
    operands = feed_forward_inputs(40, 48, 96, 50, torch.float32)
    x = operands[0]
    clean = tiles.feed_forward(*operands, parts=parts)[0]
    x[1, 3], x[2, 5], x[35, 0] = math.nan, math.inf, 1e38
    ours = tiles.feed_forward(*operands, parts=parts)[0]
    assert ours[1].isnan().all()
    assert not ours[2].isfinite().any()
    others = [i for i in range(40) if i not in (1, 2, 35)]
    assert torch.equal(ours[others], clean[others])
    exact = plain_feed_forward(*(t.double() for t in operands), False)[35]
    assert torch.equal(ours[35].isfinite(), exact.float().isfinite())


@DTYPES
def test_feed_forward_in_any_batch(tiles, dtype):
    x, *weights = feed_forward_inputs(70, 100, 130, 60, dtype)
    alone = torch.cat([tiles.feed_forward(row[None], *weights)[0] for row in x])
    for threads in (1, 3):
        tiles.threads(threads)
        for tokens in (16, 33, 70):
            assert torch.equal(tiles.feed_forward(x[:tokens], *weights)[0], alone[:tokens])


@DTYPES
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize("sizes", [(130, 33, 70, 40), (129, 16, 31, 64), (140, 40, 300, 1)])
def test_backward(tiles, sizes, tanh, dtype):
    """Weights, activations and gradients that lie across K. (Fewer tokens in float32 take the vectors' way.)"""
    operands = feed_forward_inputs(*sizes, dtype)
    x, w_in, _, w_out, _ = operands
    grad_out = torch.randn(sizes[0], sizes[3]).to(dtype)
    preactivation = tiles.feed_forward(*operands, tanh, save=True)[1]
    ours = tiles.backward(grad_out, x, w_in, w_out, preactivation, tanh)
    tiles.threads(1)
    assert all(map(torch.equal, ours, tiles.backward(grad_out, x, w_in, w_out, preactivation, tanh)))
    plain = []
    for wanted in (dtype, torch.float64):
        leaves = [t.to(wanted).requires_grad_() for t in operands]
        plain.append(torch.autograd.grad(plain_feed_forward(*leaves, tanh), leaves, grad_out.to(wanted)))
    for name, *gradients in zip(("x", "w_in", "b_in", "w_out", "b_out"), ours, *plain, strict=True):
        assert_three_way(*gradients, name=name)


@DTYPES
def test_special_numbers_backward(tiles, dtype):
    operands = feed_forward_inputs(130, 33, 70, 40, dtype)
    x, w_in, _, w_out, _ = operands
    preactivation = tiles.feed_forward(*operands, save=True)[1]
    grad_out = torch.randn(130, 40).to(dtype)
    clean = tiles.backward(grad_out, x, w_in, w_out, preactivation)
    grad_out[70, 3] = math.inf
    x[50, 7] = math.nan
    grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out = tiles.backward(grad_out, x, w_in, w_out, preactivation)
    others = [i for i in range(130) if i != 70]
    assert not grad_x[70].isfinite().any()
    assert torch.equal(grad_x[others], clean[0][others])
    assert not grad_b_in.isfinite().any()
    assert grad_w_in[:, 7].isnan().all()
    rest = [i for i in range(40) if i != 3]
    assert torch.equal(grad_w_out[rest], clean[3][rest])
    assert not grad_w_out[3].isfinite().any()
    assert grad_b_out[3] == math.inf


@DTYPES
@FLOAT32_PARTS
def test_twin_of_products(both, parts, dtype):
    """GELU is left out: it has no fused multiply-add in the twin's library."""
    for tokens, k_size, rows in (*SIZES, (64, 3000, 64)):
        x, w, bias = inputs(tokens, k_size, rows, dtype)
        x[0, 0] *= 2.0**-120
        assert_same_bits(*(tiles.project(x, [w], [bias], parts) for tiles in both))


# ---- in torch's threads ----


def test_configuration_is_put_back(libraries):
    """What other code left in the thread (here a tile of 7 rows of 48 bytes) is in force again; so is none."""
    theirs = torch.zeros(64, dtype=torch.uint8)
    theirs[0], theirs[16], theirs[48] = 1, 48, 7  # palette, bytes of a row and rows of the first tile
    library = libraries("hardware").library
    for before in (theirs, None):
        after = torch.full((64,), 255, dtype=torch.uint8)
        library.configuration_after_use(address(before), address(after))
        assert torch.equal(after, torch.zeros(64, dtype=torch.uint8) if before is None else before)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_products_in_the_same_threads(kernels, on_threads, threads):
    """oneDNN configures the tiles of the same threads, in its own way."""
    x, w_in, b_in, w_out, b_out = feed_forward_inputs(70, 96, 160, 96, torch.bfloat16)
    floats = [t.float() for t in (x, w_in, b_in, w_out, b_out)]
    shapes = [(3, 32, 16), (70, 96, 33), (128, 256, 512), (17, 64, 100)]
    products = [(torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()) for m, k, n in shapes]

    def ours(operands):
        return kernels.gelu_ffn_forward(*operands, False, False)[0]

    def alternate():
        expected = [F.linear(a, b) for a, b in products]
        first = [ours(operands) for operands in ((x, w_in, b_in, w_out, b_out), floats)]
        for _ in range(5):
            for (a, b), result in zip(products, expected, strict=True):
                assert torch.equal(F.linear(a, b), result)
                assert torch.equal(ours((x, w_in, b_in, w_out, b_out)), first[0])
                assert torch.equal(ours(floats), first[1])

    on_threads(threads, alternate)


def test_parts_of_float32(kernels):
    x, *weights = feed_forward_inputs(40, 96, 160, 96, torch.float32)
    before = kernels.set_float32_parts(3)
    try:
        exact = plain_feed_forward(*(t.double() for t in (x, *weights)), False)
        errors = []
        for parts in (3, 2, 1):
            kernels.set_float32_parts(parts)
            errors.append((kernels.gelu_ffn_forward(x, *weights, False, False)[0] - exact).abs().max().item())
        if kernels.get_isa() == ISAS.index("amx"):
            assert errors[0] < 2e-6 < errors[1] < 2e-4 < errors[2] < 0.1
        else:
            assert errors[0] == errors[1] == errors[2]
        with pytest.raises(RuntimeError, match="parts must be 1, 2 or 3, got 4"):
            kernels.set_float32_parts(4)
    finally:
        kernels.set_float32_parts(before)


@pytest.mark.skipif(not has_amx(), reason="this processor has no AMX")
def test_matmul_precision():
    """torch.set_float32_matmul_precision is followed by the op, as it was set last."""
    x, *weights = feed_forward_inputs(40, 96, 160, 96, torch.float32)
    exact = plain_feed_forward(*(t.double() for t in (x, *weights)), False)
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        with backends.use_cpu_isa("amx"):
            for precision in ("medium", "high", "highest"):
                torch.set_float32_matmul_precision(precision)
                errors[precision] = (gelu_ffn(x, *weights) - exact).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 2e-6 < errors["high"] < 2e-4 < errors["medium"] < 0.1
    # a call without the wrapper, as in a traced graph, is float32 again
    assert torch.ops.roberta_kernels_cpu.set_float32_parts(3) == 3
