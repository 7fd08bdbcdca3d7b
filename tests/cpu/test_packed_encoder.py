"""pack_weight and packed_encoder of the CPU library, against plain torch in float64.

A weight kept with less than float32 is compared with the rounded weight itself: what is left is what the products
round, and that is held to the promise. Where the rows are rounded too, plain torch rounds them in the same way.
"""

from __future__ import annotations

import pytest
import torch

from roberta_kernels.tolerance import assert_three_way

from .conftest import ISAS
from .encoder_cases import EPS, SIZES, make_layers, plain

KINDS = ("float32", "bfloat16", "int8", "int8-dynamic")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
FORMS = pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
WEIGHTS = ("qkv", "attention_out", "inner", "out")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rounded_weight(weight, kind):
    """What pack_weight keeps of a weight."""
    if kind == "float32":
        return weight
    if kind == "bfloat16":
        return weight.bfloat16().float()
    if kind == "int8":  # a scale for every 32 elements of a row
        return torch.cat([rounded_weight(group, "int8-dynamic") for group in weight.split(32, 1)], 1)
    largest = weight.abs().amax(1, keepdim=True)
    scaled = weight * (torch.full_like(largest, 127) / largest)  # a number over a tensor is its reciprocal's product
    return (scaled + 0.5 * scaled.sign()).trunc() * (largest / 127)  # halves away from zero


def rounded_layers(layers, kind):
    return [{n: rounded_weight(t, kind) if n in WEIGHTS else t for n, t in layer.items()} for layer in layers]


def rounded_rows(x):
    """Each row as scale * (u - zero), u from 0 to 255: what int8-dynamic multiplies in its place."""
    row = x.float()
    low, high = row.amin(1, keepdim=True).clamp(max=0), row.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    zero = (-low / step + 0.5).trunc()
    return (step.double() * ((row / step + zero + 0.5).trunc().clamp(0, 255) - zero)).nan_to_num().to(x.dtype)


def pack(kernels, layers, kind):
    """The op's argument `layers`."""
    found = []
    for w in layers:
        found += [kernels.pack_weight(w["qkv"], kind), *w["qkv_bias"].chunk(3)]
        found += [kernels.pack_weight(w["attention_out"], kind), w["attention_out_bias"]]
        found += [w["attention_norm_weight"], w["attention_norm_bias"]]
        found += [kernels.pack_weight(w["inner"], kind), w["inner_bias"]]
        found += [kernels.pack_weight(w["out"], kind), w["out_bias"], w["norm_weight"], w["norm_bias"]]
    return found


def encode(kernels, x, packed, lengths, heads, *, causal=False, key_mask=None, tanh=False):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    scale = (x.shape[1] // heads) ** -0.5
    return kernels.packed_encoder(
        x, packed, cu_seqlens, max(lengths, default=0), key_mask, causal, heads, scale, EPS, tanh
    )


def check(kernels, kind, hidden, inner, heads, lengths, *, count=2, **options):
    count = 1 if kind == "int8-dynamic" else count
    layers = make_layers(count, hidden, inner)
    x = torch.randn(sum(lengths), hidden)
    ours = encode(kernels, x, pack(kernels, layers, kind), lengths, heads, **options)
    kept = rounded_layers(layers, kind)
    rows = rounded_rows if kind == "int8-dynamic" else lambda x: x
    exact = plain(x.double(), kept, lengths, heads, rows=rows, **options)
    if kind != "int8-dynamic":
        return assert_three_way(ours, plain(x, kept, lengths, heads, **options), exact, floor_ulps=8.0)
    # An element near the middle of two integers may go to either, and whatever reads its row moves a little.
    # Rounding in another way than this would move all of them, as far as rounding does.
    moved = (exact - plain(x.double(), layers, lengths, heads, **options)).square().mean().sqrt()
    difference = ours - exact
    assert difference.square().mean().sqrt() < 0.4 * moved
    assert difference.abs().median() < 0.05 * moved
    return None


@EVERY_KIND
@pytest.mark.parametrize(("hidden", "inner", "heads"), SIZES)
@pytest.mark.parametrize("lengths", [[1], [2, 3], [14], [17, 0, 12], [29, 1, 70]], ids=str)
def test_against_float64(kernels, kind, hidden, inner, heads, lengths):
    check(kernels, kind, hidden, inner, heads, lengths)


@EVERY_KIND
@FORMS
def test_causal_with_a_key_mask(kernels, kind, tanh):
    lengths = [19, 33, 5]
    key_mask = torch.rand(sum(lengths)) < 0.7
    key_mask[[0, 19, 52]] = True
    for mask, causal in ((key_mask, True), (key_mask, False), (None, True)):
        check(kernels, kind, 64, 96, 2, lengths, causal=causal, key_mask=mask, tanh=tanh)


@EVERY_KIND
def test_model_sizes(kernels, kind):
    check(kernels, kind, 768, 3072, 12, [9, 38], count=1)
    check(kernels, kind, 1024, 4096, 16, [3], count=1)


@EVERY_KIND
def test_more_tokens_than_one_group(kernels, kind):
    check(kernels, kind, 32, 40, 2, [500, 700, 3, 0, 400, 1300, 60], count=1)


def test_sequence_that_sees_no_key(kernels):
    key_mask = torch.ones(8, dtype=torch.bool)
    key_mask[3:] = False
    check(kernels, "float32", 32, 40, 2, [3, 5], key_mask=key_mask)


@EVERY_KIND
def test_sequence_alone_and_in_any_batch_gives_the_same_bits(kernels, kind):
    lengths = [1, 40, 900, 13, 300, 2]
    packed = pack(kernels, make_layers(2, 64, 96), kind)
    x = torch.randn(sum(lengths), 64)
    together = encode(kernels, x, packed, lengths, 2)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        assert torch.equal(together[here], encode(kernels, x[here], packed, [length], 2)), length
        start += length


@EVERY_KIND
def test_threads_do_not_change_a_bit(kernels, kind, on_threads):
    lengths = [300, 5, 77, 800]
    packed = pack(kernels, make_layers(2, 64, 200), kind)
    x = torch.randn(sum(lengths), 64)
    one, two, four = (on_threads(n, lambda: encode(kernels, x, packed, lengths, 2)) for n in (1, 2, 4))
    assert torch.equal(one, two)
    assert torch.equal(one, four)
    assert torch.equal(one, encode(kernels, x, packed, lengths, 2))


@EVERY_KIND
def test_packing_on_any_threads_gives_the_same_bytes(kernels, kind, on_threads):
    weight = torch.randn(200, 75)
    layers = make_layers(1, 64, 96)
    x = torch.randn(9, 64)
    first, second = (on_threads(n, lambda: encode(kernels, x, pack(kernels, layers, kind), [9], 2)) for n in (1, 2))
    assert torch.equal(first, second)
    transposed = kernels.pack_weight(weight.t().contiguous().t(), kind)  # strides do not matter
    assert transposed.shape == kernels.pack_weight(weight, kind).shape


@EVERY_KIND
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_sequence_and_no_other(kernels, kind, value):
    packed = pack(kernels, make_layers(1, 64, 96), kind)
    x = torch.randn(12, 64)
    x[2, 7] = value
    out = encode(kernels, x, packed, [5, 7], 2)
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()


@EVERY_KIND
def test_a_weight_that_is_not_finite_is_not_hidden(kernels, kind):
    layers = make_layers(1, 64, 96)
    layers[0]["out"][3, 5] = float("nan")
    out = encode(kernels, torch.randn(4, 64), pack(kernels, layers, kind), [4], 2)
    assert out.isnan().all()


@EVERY_KIND
def test_zero_rows_and_zero_weights(kernels, kind):
    """No scale can be made of them; the answer is the biases'."""
    layers = make_layers(1, 64, 96)
    layers[0]["qkv"].zero_()
    layers[0]["attention_out"][5] = 0
    layers[0]["inner"].zero_()
    layers[0]["inner_bias"].zero_()
    x = torch.zeros(3, 64)
    ours = encode(kernels, x, pack(kernels, layers, kind), [3], 2)
    exact = plain(x.double(), layers, [3], 2)
    assert (ours - exact).abs().max() < (1e-5 if kind == "float32" else 0.1)


def test_largest_integers_do_not_saturate(kernels):
    """u = 255 and q = 127 or -127 in every place: a product of pairs in 16 bits would saturate."""
    layers = make_layers(1, 64, 4096)
    layers[0]["out"] = torch.ones(64, 4096) * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    layers[0]["inner"].zero_()
    layers[0]["inner_bias"] = torch.full((4096,), 3.0)
    x = torch.randn(5, 64)
    ours = encode(kernels, x, pack(kernels, layers, "int8-dynamic"), [5], 2)
    exact = plain(x.double(), layers, [5], 2)
    assert (ours - exact).abs().max() < 1e-2  # sums of 12288, whose residual alone is rounded


@EVERY_KIND
def test_no_tokens(kernels, kind):
    packed = pack(kernels, make_layers(1, 64, 96), kind)
    assert encode(kernels, torch.empty(0, 64), packed, [], 2).shape == (0, 64)
    assert encode(kernels, torch.empty(0, 64), packed, [0, 0], 2).shape == (0, 64)


def test_no_layers(kernels):
    x = torch.randn(7, 64)
    assert torch.equal(encode(kernels, x, [], [3, 4], 2), x)


def test_bytes_of_a_packed_weight(kernels):
    """A share of float32's, padded to whole panels, with what int8 is scaled by."""
    elements = 768 * 3072
    sizes = {kind: kernels.pack_weight(torch.randn(3072, 768), kind).numel() for kind in KINDS}
    room = 2**21 + 4096  # that its start may be aligned; never touched
    assert 4 * elements <= sizes["float32"] < 4 * elements + room
    assert 2 * elements <= sizes["bfloat16"] < 2 * elements + room
    assert elements + 4 * elements // 32 <= sizes["int8"] < elements + 4 * elements // 32 + room
    assert elements + 8 * 3072 <= sizes["int8-dynamic"] < elements + 8 * 3072 + room


def test_a_weight_packed_for_another_instruction_set_is_refused(kernels):
    others = [isa for isa in range(len(ISAS)) if isa != kernels.get_isa() and kernels.isa_available(isa)]
    if not others:
        pytest.skip("this processor has one instruction set only")
    here = kernels.set_isa(others[0])
    packed = pack(kernels, make_layers(1, 64, 96), "float32")
    kernels.set_isa(here)
    with pytest.raises(RuntimeError, match=f"packed for another instruction set, {ISAS[others[0]]}"):
        encode(kernels, torch.randn(4, 64), packed, [4], 2)


def _wrong(position, value):
    def change(packed):
        packed[position] = value
        return packed

    return change


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (lambda packed: packed[:-1], 2, "14 tensors"),
        (_wrong(0, torch.zeros(100, dtype=torch.uint8)), 2, "not what pack_weight gave"),
        (_wrong(0, torch.randn(192, 64)), 2, "not what pack_weight gave"),
        (_wrong(1, torch.randn(63)), 2, "the query's bias of layer 0 must have shape \\[64\\]"),
        (_wrong(13, torch.randn(64).double()), 2, "bias of the norm of layer 0 must be Float"),
        (lambda packed: [*packed[:4], packed[0], *packed[5:]], 2, "does not fit here"),
        (lambda packed: packed, 3, "do not divide into the heads"),
        (lambda packed: packed, 8, "head_dim must be a multiple of 8"),
        (lambda packed: packed, 0, "heads must be positive"),
    ],
)
def test_wrong_arguments_are_refused(kernels, change, heads, message):
    packed = change(pack(kernels, make_layers(1, 64, 96), "float32"))
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        kernels.packed_encoder(torch.randn(4, 64), packed, cu_seqlens, 4, None, False, heads, 0.1, EPS, False)


def test_wrong_rows_are_refused(kernels):
    packed = pack(kernels, make_layers(1, 64, 96), "float32")
    with pytest.raises(RuntimeError, match="must end at the number of tokens"):
        encode(kernels, torch.randn(5, 64), packed, [4], 2)
    with pytest.raises(RuntimeError, match="x must be Float"):
        encode(kernels, torch.randn(4, 64).bfloat16(), packed, [4], 2)
    with pytest.raises(RuntimeError, match="key_mask must have shape"):
        encode(kernels, torch.randn(4, 64), packed, [4], 2, key_mask=torch.ones(3, dtype=torch.bool))


def test_wrong_weights_are_refused(kernels):
    with pytest.raises(RuntimeError, match="kind must be float32, bfloat16, int8 or int8-dynamic, got int4"):
        kernels.pack_weight(torch.randn(4, 4), "int4")
    with pytest.raises(RuntimeError, match="weight must be Float"):
        kernels.pack_weight(torch.randn(4, 4).bfloat16(), "int8")
    with pytest.raises(RuntimeError, match="weight must have shape"):
        kernels.pack_weight(torch.randn(4), "int8")
