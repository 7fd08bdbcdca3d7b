"""Dropout: the generator, and that every backend draws the mask that docs/design.md defines, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from roberta_kernels import ops
from roberta_kernels.reference.philox import drop_threshold, keep_mask, philox

from . import eager
from .cases import FLOAT32, Draw, Served, cumulative, on_every_backend, output_and_gradients

PROBABILITIES = (0.1, 0.5, 0.999)
LOW = 0xFFFFFFFF


def philox_in_integers(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 (Salmon et al. 2011, section 4.1) once more, in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & LOW, (product0 >> 32) ^ c3 ^ k1, product0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


# Random123's kat_vectors, philox 4x32 10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW, LOW, LOW, LOW), (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def seed_of(key: tuple[int, int]) -> Tensor:
    """The int64 seed whose low and high halves are the key."""
    value = key[0] | key[1] << 32
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = philox(seed_of(key), *(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in words) == answer
    assert philox_in_integers(counter, key) == answer  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [(5, 0), (LOW, 0), (0, 1), (0x89ABCDEF, 0xFEDCBA98)])
def test_mask_is_what_the_design_defines(key: tuple[int, int]) -> None:
    """Counter (column // 4, row, plane, 0), word column % 4, kept when the word is at least floor(p * 2**32)."""
    rows, columns, planes, dropout_p = [0, 1, 2, 77, 2**31 - 1], 11, [0, 3], 0.3
    mask = keep_mask(torch.tensor(rows), columns, torch.tensor(planes), dropout_p, seed_of(key))
    for i, plane in enumerate(planes):
        for j, row in enumerate(rows):
            for column in range(columns):
                word = philox_in_integers((column // 4, row, plane, 0), key)[column % 4]
                assert bool(mask[i, j, column]) == (word >= int(0.3 * 2**32))


@pytest.mark.parametrize(("dropout_p", "threshold"), [(0.0, 0), (0.5, 2**31), (0.1, 429496729), (1e-12, 0)])
def test_threshold(dropout_p: float, threshold: int) -> None:
    assert drop_threshold(dropout_p) == threshold


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
def test_keep_rate(dropout_p: float, draw: Draw) -> None:
    """As many are kept as should be: overall, by row, by column and by plane, within six standard deviations."""
    planes, rows, columns = 8, 250, 500
    mask = keep_mask(
        torch.arange(rows, device=draw.device),
        columns,
        torch.arange(planes, device=draw.device),
        dropout_p,
        draw.seed(),
    ).double()

    def deviations(kept: Tensor, count: int) -> float:
        return float((kept - count * (1 - dropout_p)).abs().max()) / (count * dropout_p * (1 - dropout_p)) ** 0.5

    assert deviations(mask.sum(), mask.numel()) < 6
    assert deviations(mask.sum((1, 2)), rows * columns) < 6
    assert deviations(mask.sum((0, 2)), planes * columns) < 6 + 4 * (dropout_p > 0.9)  # few are kept: a skewed tail
    assert deviations(mask.sum((0, 1)), planes * rows) < 6 + 4 * (dropout_p > 0.9)
    # Neighbours are independent: along each dimension, the products of deviations average to nothing.
    centred = mask - (1 - dropout_p)
    for dim in range(3):
        products = centred.narrow(dim, 1, mask.shape[dim] - 1) * centred.narrow(dim, 0, mask.shape[dim] - 1)
        assert abs(float(products.mean())) < 6 * dropout_p * (1 - dropout_p) / products.numel() ** 0.5 + 1e-5


@on_every_backend(dtypes=[FLOAT32])
def test_the_word_at_the_threshold_is_kept(served: Served) -> None:
    """p chosen so that the threshold is the very word of one element, and then one more."""
    key = (0x01234567, 0x89ABCDEF)
    row, column = 2, 5
    word = philox_in_integers((column // 4, row, 0, 0), key)[column % 4]
    seed = seed_of(key).to(served.device)
    assert dropped_ones(served, seed, word / 2**32)[row, column] != 0
    assert dropped_ones(served, seed, (word + 1) / 2**32)[row, column] == 0


# ---------------------------------------------------------------------- the masks that the kernels draw, made visible


def embedding_mask(
    served: Served, tokens: int, hidden: int, dropout_p: float, seed: Tensor
) -> tuple[Tensor, Tensor, float]:
    """(forward's mask, backward's, what a kept element was multiplied by): the output is dropout(1)."""
    zeros = torch.zeros(tokens, dtype=torch.int64, device=served.device)
    table = torch.linspace(-1, 1, hidden, device=served.device).to(served.dtype)[None]
    weight, bias = torch.zeros_like(table[0]), torch.ones_like(table[0])
    grads = []
    out = None
    for row in range(tokens):  # alone in the gradient, a row leaves its mask in the gradient of bias
        grad = torch.zeros(tokens, hidden, dtype=served.dtype, device=served.device)
        grad[row] = 1.0
        got = output_and_gradients(
            lambda bias: ops.embedding_layer_norm(
                *(zeros, zeros, zeros, table, table, table, weight, bias), eps=1e-5, dropout_p=dropout_p, seed=seed
            ),
            {"bias": bias},
            grad,
        )
        out = got["output"]
        grads.append(got["gradient of bias"] != 0)
    assert out is not None
    return out != 0, torch.stack(grads), float(out.max())


def add_layer_norm_mask(
    served: Served, tokens: int, hidden: int, dropout_p: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(forward's mask, backward's) of the columns from 2 on.

    The first two columns hold +-30 from residual, the others x's 1 or 0: those that come out above their row's mean
    were kept. The gradient of x is zero where dropped. Where kept it must not cancel to zero, which among thousands of
    random numbers one does now and then: of a gradient that is 1 in the first column, 0 elsewhere, column j gets
    -(1 + u_0 * u_j) * rstd / hidden, u the normalised row, and that depends on nothing but how many were kept.
    """
    x = torch.ones(tokens, hidden, dtype=served.dtype, device=served.device)
    x[:, :2] = 0.0
    residual = torch.zeros_like(x)
    residual[:, 0], residual[:, 1] = 30.0, -30.0
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    grad = torch.zeros_like(x)
    grad[:, 0] = 1.0
    got = output_and_gradients(
        lambda x: ops.add_layer_norm(x, residual, weight, bias, eps=1e-5, dropout_p=dropout_p, seed=seed),
        {"x": x},
        grad,
    )
    return (got["output"] > 0)[:, 2:], (got["gradient of x"] != 0)[:, 2:]


def attention_mask(
    served: Served, lengths_q: list[int], lengths_k: list[int], heads: int, dropout_p: float, seed: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(forward's masks, backward's), `[heads, length_q, length_k]` for each sequence.

    Equal scores and one-hot values: the output holds the softmax weights, zero where dropped. One-hot output gradients:
    the gradient of v holds them too. A window of head_dim keys (or queries) at a time.
    """
    head_dim = 32
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    cu_seqlens_q, cu_seqlens_k = cumulative(lengths_q, served.device), cumulative(lengths_k, served.device)
    zeros = torch.zeros(max(total_q, total_k), heads, head_dim, dtype=served.dtype, device=served.device)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    options = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k), "dropout_p": dropout_p, "seed": seed}

    def one_hot(lengths: list[int], window: int) -> Tensor:
        """Row j of each sequence has a one at j - window."""
        place = torch.cat([torch.arange(length) - window for length in lengths])
        inside = (place >= 0) & (place < head_dim)
        hot = torch.nn.functional.one_hot(place.clamp(0, head_dim - 1), head_dim) * inside[:, None]
        return hot[:, None, :].expand(-1, heads, -1).to(served.device, served.dtype).contiguous()

    shapes = list(zip(lengths_q, lengths_k, strict=True))
    forward = [torch.zeros(heads, i, j, dtype=torch.bool) for i, j in shapes]
    backward = [torch.zeros(heads, i, j, dtype=torch.bool) for i, j in shapes]
    for window in range(0, max(max(lengths_k), max(lengths_q)), head_dim):
        got = output_and_gradients(
            lambda v: ops.attention(zeros[:total_q], zeros[:total_k], v, cu_seqlens_q, cu_seqlens_k, **options),
            {"v": one_hot(lengths_k, window)},
            one_hot(lengths_q, window),
        )
        for b, (length_q, length_k) in enumerate(shapes):
            out = got["output"][starts_q[b] : starts_q[b + 1]].permute(1, 0, 2).cpu()
            keys = max(0, min(head_dim, length_k - window))
            forward[b][:, :, window : window + keys] = out[:, :, :keys] != 0
            grad = got["gradient of v"][starts_k[b] : starts_k[b + 1]].permute(1, 2, 0).cpu()
            queries = max(0, min(head_dim, length_q - window))
            backward[b][:, window : window + queries] = grad[:, :queries] != 0
    return forward, backward


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
@on_every_backend()
def test_embedding_layer_norm_draws_the_mask(served: Served, dropout_p: float, draw: Draw) -> None:
    for tokens, hidden in ((5, 37), (9, 96)):
        seed = draw.seed()
        expected = eager.row_keep((tokens, hidden), dropout_p, seed)
        forward, backward, multiplier = embedding_mask(served, tokens, hidden, dropout_p, seed)
        assert torch.equal(forward, expected)
        assert torch.equal(backward, expected)
        if bool(expected.any()):
            assert multiplier == pytest.approx(1 / (1 - dropout_p), rel=torch.finfo(served.dtype).eps)


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
@on_every_backend()
def test_add_layer_norm_draws_the_mask(served: Served, dropout_p: float, draw: Draw) -> None:
    for tokens, hidden in ((5, 39), (40, 96)):
        seed = draw.seed()
        expected = eager.row_keep((tokens, hidden), dropout_p, seed)[:, 2:]
        forward, backward = add_layer_norm_mask(served, tokens, hidden, dropout_p, seed)
        if served.dtype == FLOAT32 or dropout_p < 0.9:  # (a survivor of 1000 beside +-30 is beyond 16 bits' mean)
            assert torch.equal(forward, expected)
        assert torch.equal(backward, expected)


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
@on_every_backend()
def test_attention_draws_the_mask(served: Served, dropout_p: float, draw: Draw) -> None:
    """Rows are packed query rows, columns count within the sequence, planes are heads."""
    lengths_q, lengths_k = ([7, 1, 5], [9, 3, 35]) if served.interpreted else ([7, 1, 33, 70], [9, 3, 97, 70])
    heads, seed = 3, draw.seed()
    forward, backward = attention_mask(served, lengths_q, lengths_k, heads, dropout_p, seed)
    start = 0
    for b, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows = torch.arange(start, start + length_q, device=served.device)
        start += length_q
        expected = keep_mask(rows, length_k, torch.arange(heads, device=served.device), dropout_p, seed).cpu()
        assert torch.equal(forward[b], expected), f"forward, sequence {b}"
        assert torch.equal(backward[b], expected), f"backward, sequence {b}"


# ------------------------------------------------------------------------------------------------------------ seeds


def dropped_ones(served: Served, seed: Tensor, dropout_p: float = 0.5) -> Tensor:
    """An op whose output shows its mask."""
    zeros = torch.zeros(4, dtype=torch.int64, device=served.device)
    table = torch.zeros(1, 64, dtype=served.dtype, device=served.device)
    return ops.embedding_layer_norm(
        *(zeros, zeros, zeros, table, table, table, table[0], torch.ones_like(table[0])),
        eps=1.0,
        dropout_p=dropout_p,
        seed=seed,
    )


@on_every_backend(dtypes=[FLOAT32])
def test_seeds(served: Served, draw: Draw) -> None:
    seed = draw.seed()
    same = dropped_ones(served, seed)
    assert torch.equal(same, dropped_ones(served, seed.clone()))
    assert torch.equal(same, dropped_ones(served, seed.reshape(()))), "one element, of any shape"
    for other in (seed ^ 1, seed ^ (1 << 31), seed ^ (1 << 32), seed ^ (1 << 62), ~seed):
        assert not torch.equal(same, dropped_ones(served, other)), "every bit of the seed counts"


@on_every_backend(dtypes=[FLOAT32])
def test_without_dropout_the_seed_plays_no_part(served: Served, draw: Draw) -> None:
    x, residual = (draw.normal(5, 32, dtype=FLOAT32) for _ in range(2))
    weight, bias = (draw.normal(32, dtype=FLOAT32) for _ in range(2))
    without = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
    assert torch.equal(
        without, ops.add_layer_norm(x, residual, weight, bias, eps=1e-5, dropout_p=0.0, seed=draw.seed())
    )


@on_every_backend(dtypes=[FLOAT32])
def test_a_probability_too_small_to_drop_anything(served: Served, draw: Draw) -> None:
    """floor(p * 2**32) is 0."""
    assert torch.equal(dropped_ones(served, draw.seed(), 1e-12), torch.ones(4, 64, device=served.device))


def test_draw_seeds(draw: Draw) -> None:
    seeds = ops.draw_seeds(5, draw.device)
    assert len(seeds) == 5
    assert all(seed.shape == (1,) and seed.dtype == torch.int64 for seed in seeds)
    assert all(seed.device.type == torch.device(draw.device).type for seed in seeds)
    assert len({int(seed) for seed in seeds}) == 5
    assert ops.draw_seeds(0, draw.device) == ()
    many = torch.cat(ops.draw_seeds(256, draw.device))
    assert (many < 0).any()
    assert (many > 0).any(), "all 64 bits are drawn"
    assert int((many & LOW).unique().numel()) == 256


def test_manual_seed_governs_the_seeds(draw: Draw) -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(7)
        first, second = ops.draw_seeds(3, draw.device), ops.draw_seeds(3, draw.device)
        torch.manual_seed(7)
        again = ops.draw_seeds(3, draw.device)
    finally:
        torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_every_backend(dtypes=[FLOAT32])
def test_activation_checkpointing_draws_the_same_mask_again(served: Served, draw: Draw) -> None:
    x = draw.normal(9, 48, dtype=FLOAT32).requires_grad_()
    weight, bias = (draw.normal(48, dtype=FLOAT32) for _ in range(2))

    def block(x: Tensor) -> Tensor:
        (seed,) = ops.draw_seeds(1, x.device)
        return ops.add_layer_norm(x, x, weight, bias, eps=1e-5, dropout_p=0.5, seed=seed)

    grads = []
    for reentrant in (None, False, True):
        torch.manual_seed(3)
        out = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        torch.randint(0, 2, (3,), device=served.device)  # the generator moves on before backward runs the block again
        grads.append(torch.autograd.grad(out.square().sum(), x)[0] if reentrant is not True else _backward(out, x))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def _backward(out: Tensor, x: Tensor) -> Tensor:
    """Reentrant checkpointing works with backward() alone."""
    out.square().sum().backward()
    assert x.grad is not None
    return x.grad
