"""How often a forward reads the device: on a GPU each time is a wait for all that was launched before."""

from __future__ import annotations

import pytest
import torch
from encoder_cases import case_of
from model_cases import Ops, batches_for, build, patched
from torch import Tensor
from torch.utils._pytree import tree_leaves

from roberta_kernels import unpadding

# What looks at data without `unpadding.read`, or brings something over from the host: `torch.tensor` is lift_fresh.
WAITING = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::unique"),
    *("aten::masked_select", "aten::lift_fresh", "aten::_unique2", "aten::bincount"),
}


class Waits(Ops):
    """Names of the ops that a GPU's host would wait in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        by_mask = name.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:])
        )
        if name in WAITING or (by_mask):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Calls it: how often a call of a model looks at the device."""
    found = []
    read = unpadding.read

    def counted(tensor):
        found.append("read")
        return read(tensor)

    monkeypatch.setattr(unpadding, "read", counted)

    def count(model, inputs, *, grad=False, **options):
        for module in model.modules():
            if hasattr(module, "check_padding"):  # looks at ids where they are on a CPU, and nowhere else
                module.check_padding = lambda *ids: None
        found.clear()
        with torch.set_grad_enabled(grad), Waits() as waits:
            model(**inputs, **options)
        return found + waits.names

    return count


def call(head, mask, padded_rows="exact", **options):
    case = case_of(head, mask=mask)
    original = build(case)
    return patched(original, padded_rows=padded_rows, **options), batches_for(case, original.config, 2)


HEADS = ("pooler", "single_label", "token", "masked_lm", "span", "causal_lm")


@pytest.mark.parametrize(
    ("head", "mask", "padded_rows", "grad"),
    [
        *((head, "right", "exact", True) for head in HEADS),
        *((head, "full", "zeros", False) for head in HEADS),
        *(("pooler", mask, padded_rows, False) for mask in ("left", "holes") for padded_rows in ("exact", "zeros")),
        *(("token", "left", padded_rows, True) for padded_rows in ("exact", "zeros")),
    ],
)
def test_once_with_a_mask(reads, head, mask, padded_rows, grad):
    """Labels too, which tell whether a token head reads padded rows."""
    model, batches = call(head, mask, padded_rows)
    options = {"use_cache": False} if head == "causal_lm" else {}
    assert reads(model, batches[0], grad=grad, **options) == ["read"]


@pytest.mark.parametrize("head", HEADS)
def test_never_without_a_mask(reads, head):
    model, batches = call(head, "none")
    options = {"use_cache": False} if head == "causal_lm" else {}
    assert reads(model, batches[0], **options) == []


def test_labels_at_padding_are_found_in_that_read(reads):
    """A loss that reads padded rows gets them, and the reader is told apart without a second look."""
    model, batches = call("token", "right")
    inputs = dict(batches[0])
    inputs["labels"] = torch.zeros_like(inputs["labels"])
    assert reads(model, inputs) == ["read"]
    with torch.no_grad(), Ops() as ops:
        loss = model(**inputs).loss
    assert "aten::index_copy_" in ops.names
    assert not torch.equal(loss, model(**batches[0]).loss)


def test_what_padding_holds_is_asked_a_second_time_only_where_it_is_no_padding(reads):
    model, batches = call("pooler", "real_ids")
    assert reads(model, batches[0]) == ["read", "read"]
    positions = torch.arange(batches[0]["input_ids"].shape[1])[None] + 2
    assert reads(model, {**batches[0], "position_ids": positions}) == ["read"], "which ask for all at once"
    types = torch.zeros_like(batches[0]["input_ids"])
    assert reads(model, {**batches[0], "token_type_ids": types}) == ["read"]


def test_embeddings_are_seen_to_be_finite_in_that_read(reads):
    model, batches = call("pooler", "right")
    ids = batches[0]["input_ids"]
    inputs = {"inputs_embeds": torch.randn(*ids.shape, 64), "attention_mask": batches[0]["attention_mask"]}
    assert reads(model, inputs) == ["read"]


def test_the_counter_counts(reads):
    class Looks(torch.nn.Module):
        def forward(self, x):
            return x[x > 0], bool(x.any()), torch.tensor([1, 2])

    assert len(reads(Looks(), {"x": torch.ones(3)})) == 3
