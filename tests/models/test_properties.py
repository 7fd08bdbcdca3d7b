"""Properties that hold for any batch: any mask, any ids, any lengths."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from model_cases import Case, build, patched

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import roberta_kernels as rk

SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "hidden_act": "gelu",
}


@functools.cache
def models(head):
    original = build(Case(seed=1, head=head, config=SMALL | {"pad_token_id": 1}))
    return original, patched(original), patched(original, layout="padded")


@st.composite
def batches(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    # Any id, the padding id among them, wherever it may stand; any mask, an empty one among them.
    ids = draw(st.lists(st.integers(0, 29), min_size=batch * length, max_size=batch * length))
    mask = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    return torch.tensor(ids).view(batch, length), torch.tensor(mask).view(batch, length).long()


@settings(max_examples=60, deadline=None)
@given(batches())
def test_real_positions_are_the_originals(drawn):
    ids, mask = drawn
    original, packed, padded = models("no_pooler")
    with torch.no_grad():
        want, got, also = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (original, packed, padded))
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(also[real], want[real], rtol=2e-4, atol=2e-5)
    assert got.isfinite().all()
    assert also.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(batches())
def test_what_reads_the_first_position_gets_the_originals(drawn):
    ids, mask = drawn
    some = mask.any(1)  # of a sequence that is all padding, nothing is known
    original, packed, padded = models("single_label")
    with torch.no_grad():
        want, got, also = (m(input_ids=ids, attention_mask=mask).logits[some] for m in (original, packed, padded))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(also, want, rtol=2e-4, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans())
def test_losses_over_positions_are_the_originals(drawn, ignore_padding):
    ids, mask = drawn
    labels = torch.where(mask.bool(), ids, -100) if ignore_padding else ids
    mask[:, 0] = 1
    for head in ("masked_lm", "token", "causal_lm"):
        original, packed, _ = models(head)
        wanted = labels % 3 if head == "token" else labels
        wanted = torch.where(labels == -100, -100, wanted)
        kwargs = {"use_cache": False} if head == "causal_lm" else {}
        with torch.no_grad():
            want, got = (
                m(input_ids=ids, attention_mask=mask, labels=wanted, **kwargs).loss for m in (original, packed)
            )
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_sequence_does_not_see_its_batch(drawn, random):
    # Alone, or among others in any order: the same.
    ids, mask = drawn
    mask[:, 0] = 1
    order = list(range(len(ids)))
    random.shuffle(order)
    _, packed, _ = models("no_pooler")
    with torch.no_grad():
        together = packed(input_ids=ids, attention_mask=mask).last_hidden_state
        moved = packed(input_ids=ids[order], attention_mask=mask[order]).last_hidden_state
        alone = [packed(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).last_hidden_state[0] for i in order]
    torch.testing.assert_close(moved, together[order], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(torch.stack(alone), together[order], rtol=2e-5, atol=2e-6)


@settings(max_examples=15, deadline=None)
@given(st.permutations(["", "base", "layer 0", "layer 1", "embeddings"]), st.integers(1, 5), batches())
def test_the_order_of_patching_does_not_matter(parts, count, drawn):
    ids, mask = drawn
    original, packed, _ = models("masked_lm")
    ours = copy.deepcopy(original)
    base = ours.base_model
    modules = {"": ours, "base": base, "embeddings": base.embeddings}
    modules |= {f"layer {i}": layer for i, layer in enumerate(base.encoder.layer)}
    for part in dict.fromkeys([*parts[:count], ""]):  # some parts first, and in the end all
        rk.patch(modules[part])
    assert [type(module) for module in ours.modules()] == [type(module) for module in packed.modules()]
    with torch.no_grad():
        got, want = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, packed))
    assert torch.equal(got, want)
    rk.unpatch(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in original.modules()]
