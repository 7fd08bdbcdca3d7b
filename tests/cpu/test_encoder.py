"""The op `encoder` of the CPU library, on the parameters themselves, against plain torch in float64; and the contract
of every inference: the same sequence gives the same bits alone or in any batch, in any order, with any number of
threads, padded to any length.
"""

from __future__ import annotations

import pytest
import torch

from roberta_kernels.tolerance import assert_three_way

from .encoder_cases import EPS, SIZES, make_layers, plain

DTYPES = (torch.float32, torch.bfloat16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that torch hands out is full of NaN: an element of the output that is not written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def model(count, hidden, inner, dtype):
    return [{name: tensor.to(dtype) for name, tensor in layer.items()} for layer in make_layers(count, hidden, inner)]


def tensors(layers):
    """The op's argument `layers`."""
    found = []
    for w in layers:
        for weight, bias in zip(w["qkv"].chunk(3), w["qkv_bias"].chunk(3), strict=True):
            found += [weight, bias]
        for name in ("attention_out", "attention_norm", "inner", "out", "norm"):
            found += [w[f"{name}_weight"] if "norm" in name else w[name], w[f"{name}_bias"]]
    return found


def encode(kernels, x, layers, lengths, heads, *, causal=False, key_mask=None, tanh=False):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    scale = (x.shape[1] // heads) ** -0.5
    return kernels.encoder(
        x, tensors(layers), cu_seqlens, max(lengths, default=0), key_mask, causal, heads, scale, EPS, tanh
    )


def check(kernels, dtype, hidden, inner, heads, lengths, *, count=2, **options):
    layers = model(count, hidden, inner, dtype)
    x = torch.randn(sum(lengths), hidden).to(dtype)
    ours = encode(kernels, x, layers, lengths, heads, **options)
    exact = plain(x.double(), layers, lengths, heads, **options)
    assert_three_way(ours, plain(x, layers, lengths, heads, **options), exact, floor_ulps=8.0)


@EVERY_DTYPE
@pytest.mark.parametrize(("hidden", "inner", "heads"), SIZES)
@pytest.mark.parametrize("lengths", [[1], [2, 3], [14], [17, 0, 12], [29, 1, 70], [131]], ids=str)
def test_against_float64(kernels, dtype, hidden, inner, heads, lengths):
    check(kernels, dtype, hidden, inner, heads, lengths)


@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
def test_sizes_of_heads(kernels, dtype, head_dim):
    check(kernels, dtype, 3 * head_dim, 7 * head_dim + 1, 3, [5, 38], count=1)


@EVERY_DTYPE
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_causal_with_a_key_mask(kernels, dtype, tanh):
    lengths = [19, 33, 5]
    key_mask = torch.rand(sum(lengths)) < 0.7
    key_mask[[0, 19, 52]] = True
    for mask, causal in ((key_mask, True), (key_mask, False), (None, True)):
        check(kernels, dtype, 64, 96, 2, lengths, causal=causal, key_mask=mask, tanh=tanh)


@EVERY_DTYPE
def test_model_sizes(kernels, dtype):
    """K above one block of it, rows that lie a multiple of 4 KB apart, tokens above one block and one panel."""
    check(kernels, dtype, 768, 3072, 12, [9, 38, 100], count=1)
    check(kernels, dtype, 1024, 4096, 16, [3], count=1)


@EVERY_DTYPE
def test_more_tokens_than_one_group(kernels, dtype):
    check(kernels, dtype, 32, 40, 2, [500, 700, 3, 0, 400, 1300, 60], count=1)


@EVERY_DTYPE
def test_sequence_that_sees_no_key(kernels, dtype):
    key_mask = torch.ones(8, dtype=torch.bool)
    key_mask[3:] = False
    check(kernels, dtype, 32, 40, 2, [3, 5], key_mask=key_mask)


# ---- the contract ----


@EVERY_DTYPE
def test_sequence_alone_and_in_any_batch_and_order_gives_the_same_bits(kernels, dtype):
    layers = model(2, 64, 96, dtype)
    sequences = [torch.randn(length, 64).to(dtype) for length in (1, 40, 900, 13, 300, 2)]
    alone = [encode(kernels, x, layers, [len(x)], 2) for x in sequences]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5], [2, 4]):
        together = encode(
            kernels, torch.cat([sequences[i] for i in order]), layers, [len(sequences[i]) for i in order], 2
        )
        assert torch.equal(together, torch.cat([alone[i] for i in order])), order


@EVERY_DTYPE
def test_model_sized_sequence_alone_and_in_a_batch_gives_the_same_bits(kernels, dtype):
    layers = model(1, 768, 3072, dtype)
    sequences = [torch.randn(length, 768).to(dtype) for length in (4, 33, 96)]
    together = encode(kernels, torch.cat(sequences), layers, [4, 33, 96], 12)
    assert torch.equal(together, torch.cat([encode(kernels, x, layers, [len(x)], 12) for x in sequences]))


@EVERY_DTYPE
@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_change_a_bit(kernels, dtype, causal):
    """Padded rows hold anything that is finite; on the right, and without `causal` on the left too."""
    layers = model(2, 64, 96, dtype)
    for length in (1, 17, 70):
        x = torch.randn(length, 64).to(dtype)
        alone = encode(kernels, x, layers, [length], 2, causal=causal)
        for padded in (length + 1, length + 60):
            for left in (0,) if causal else (0, padded - length):
                rows = torch.randn(padded, 64).to(dtype)
                real = torch.zeros(padded, dtype=torch.bool)
                real[left : left + length] = True
                rows[real] = x
                out = encode(kernels, rows, layers, [padded], 2, causal=causal, key_mask=real)
                assert torch.equal(out[real], alone), (length, padded, left)


@EVERY_DTYPE
def test_threads_do_not_change_a_bit(kernels, dtype, on_threads):
    layers = model(2, 64, 200, dtype)
    for lengths in ([300, 5, 77, 800], [3]):
        x = torch.randn(sum(lengths), 64).to(dtype)
        one, *others = (on_threads(n, lambda x=x, n=lengths: encode(kernels, x, layers, n, 2)) for n in (1, 2, 4))
        assert all(torch.equal(one, other) for other in others), lengths


# ---- what is not finite, and what is not there ----


@EVERY_DTYPE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_sequence_and_no_other(kernels, dtype, value):
    layers = model(1, 64, 96, dtype)
    x = torch.randn(12, 64).to(dtype)
    x[2, 7] = value
    out = encode(kernels, x, layers, [5, 7], 2)
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["qkv", "attention_out", "inner", "out"])
def test_a_weight_that_is_not_finite_is_not_hidden(kernels, dtype, name):
    layers = model(1, 64, 96, dtype)
    layers[0][name][3, 5] = float("nan")
    assert encode(kernels, torch.randn(4, 64).to(dtype), layers, [4], 2).isnan().all()


@EVERY_DTYPE
@pytest.mark.parametrize("inner", [96, 101])
def test_rows_of_a_larger_tensor_are_read_and_nothing_between_them(kernels, dtype, inner):
    layers = model(2, 40, inner, dtype)
    x = torch.randn(21, 40).to(dtype)
    expected = encode(kernels, x, layers, [21], 1)
    for layer in layers:
        for name in ("qkv", "attention_out", "inner", "out"):
            around = torch.full((layer[name].shape[0], layer[name].shape[1] + 3), float("nan"), dtype=dtype)
            around[:, 1:-2] = layer[name]
            layer[name] = around[:, 1:-2]
    assert torch.equal(encode(kernels, x, layers, [21], 1), expected)


@EVERY_DTYPE
def test_an_edit_of_a_weight_counts_at_once(kernels, dtype):
    layers = model(1, 64, 96, dtype)
    x = torch.randn(5, 64).to(dtype)
    before = encode(kernels, x, layers, [5], 2)
    layers[0]["out"].data[7, 11] += 3
    after = encode(kernels, x, layers, [5], 2)
    assert not torch.equal(before, after)
    exact = plain(x.double(), layers, [5], 2)
    assert_three_way(after, plain(x, layers, [5], 2), exact, floor_ulps=8.0)


@EVERY_DTYPE
def test_no_tokens_and_no_layers(kernels, dtype):
    layers = model(1, 64, 96, dtype)
    assert encode(kernels, torch.empty(0, 64, dtype=dtype), layers, [], 2).shape == (0, 64)
    assert encode(kernels, torch.empty(0, 64, dtype=dtype), layers, [0, 0], 2).shape == (0, 64)
    x = torch.randn(7, 64).to(dtype)
    assert torch.equal(encode(kernels, x, [], [3, 4], 2), x)


# ---- arguments ----


def _wrong(position, value):
    def change(found):
        found[position] = value
        return found

    return change


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (lambda found: found[:-1], 2, "16 tensors for each layer, got 15"),
        (_wrong(0, torch.randn(64)), 2, r"the query's weight of layer 0 must have shape \[any, 64\], got \[64\]"),
        (_wrong(2, torch.randn(63, 64)), 2, r"the key's weight of layer 0 must have shape \[64, 64\], got \[63, 64\]"),
        (_wrong(4, torch.randn(64, 64).t()), 2, r"value's weight of layer 0 must have contiguous rows, got strides"),
        (_wrong(4, torch.randn(1, 64).expand(64, 64)), 2, r"contiguous rows, got strides \[0, 1\]"),
        (_wrong(1, torch.randn(63)), 2, r"the query's bias of layer 0 must have shape \[64\]"),
        (_wrong(6, torch.randn(64, 64).double()), 2, "weight of the attention's output of layer 0 must be Float"),
        (_wrong(10, torch.empty(0, 64)), 2, "first weight of the feed-forward of layer 0 must have shape"),
        (
            _wrong(12, torch.randn(64, 95)),
            2,
            r"second weight of the feed-forward of layer 0 must have shape \[64",
        ),
        (_wrong(15, torch.randn(64).bfloat16()), 2, "bias of the norm of layer 0 must be Float"),
        (lambda found: found, 3, "do not divide into the heads"),
        (lambda found: found, 8, "head_dim must be a multiple of 8"),
        (lambda found: found, 0, "heads must be positive"),
    ],
)
def test_wrong_arguments_are_refused(kernels, change, heads, message):
    found = change(tensors(model(1, 64, 96, torch.float32)))
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        kernels.encoder(torch.randn(4, 64), found, cu_seqlens, 4, None, False, heads, 0.1, EPS, False)


def test_wrong_rows_are_refused(kernels):
    layers = model(1, 64, 96, torch.float32)
    with pytest.raises(RuntimeError, match="must end at the number of tokens"):
        encode(kernels, torch.randn(5, 64), layers, [4], 2)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        encode(kernels, torch.randn(4, 64).half(), layers, [4], 2)
    with pytest.raises(RuntimeError, match="must be BFloat16, got Float"):
        encode(kernels, torch.randn(4, 64).bfloat16(), layers, [4], 2)
    with pytest.raises(RuntimeError, match="key_mask must have shape"):
        encode(kernels, torch.randn(4, 64), layers, [4], 2, key_mask=torch.ones(3, dtype=torch.bool))
