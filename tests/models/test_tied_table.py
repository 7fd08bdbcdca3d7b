"""A table that is word embeddings and decoder both (hf/tied_table.py): one gradient is made, with the same bits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from model_cases import batch_for, build
from test_masked_lm import FAMILIES, case_of, loss_only
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from roberta_kernels.hf import masked_lm, tied_table


def tied(case, **options):
    """(a patched model, its table, a batch with a word that comes twice)"""
    ours, report = loss_only(build(case), **options)
    table = ours.get_input_embeddings().weight
    assert table is ours.get_output_embeddings().weight
    inputs = batch_for(case, ours.config)
    inputs["input_ids"][:, 0] = 9
    return ours, table, inputs, report


class Tables(TorchDispatchMode):
    """Counts tensors of a shape that are made, and remembers where the last of them lies."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made, self.last = shape, 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.shape == self.shape and t.data_ptr() not in given:
                self.made, self.last = self.made + 1, t.data_ptr()
        return out


@pytest.fixture
def apart(monkeypatch):
    """What makes the two uses of a table gradients of their own, as autograd does by itself."""

    @contextlib.contextmanager
    def block():
        @contextlib.contextmanager
        def not_shared(weight, labels):
            yield tied_table.TiedTable(weight)

        with monkeypatch.context() as patch:
            patch.setattr(masked_lm, "shared", not_shared)
            yield

    return block


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None:
            assert got[name] is None, name
        else:
            assert got[name].layout is torch.strided
            assert torch.equal(got[name], want[name]), name


OWN_EMBEDDINGS = ("ernie", "roc_bert")  # which run their own code, with tables that the op does not have


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OWN_EMBEDDINGS])
def test_one_gradient_is_made_and_none_is_copied(family, apart):
    ours, table, inputs, report = tied(case_of(family))
    with apart():
        loss = ours(**inputs).loss
    with Tables(table.shape) as tables:
        loss.backward()
    assert tables.made >= 2, "or this test counts nothing"
    ours.zero_grad()
    loss = ours(**inputs).loss
    with Tables(table.shape) as tables:
        loss.backward()
    assert tables.made == 1
    assert table.grad.data_ptr() == tables.last
    assert report.fallbacks() == {}


def test_two_tables_have_two():
    case = case_of()
    ours, report = loss_only(build(case))
    decoder = ours.get_output_embeddings()
    decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
    loss = ours(**batch_for(case, ours.config)).loss
    with Tables(decoder.weight.shape) as tables:
        loss.backward()
    assert tables.made == 2
    assert not torch.equal(decoder.weight.grad, ours.get_input_embeddings().weight.grad)
    assert report.fallbacks() == {}


# --- what uses the gradients of a call, each as a user's code does it -------------------------------------------------


def _one_step(model, table, inputs):
    model(**inputs).loss.backward()


def _several_steps(model, table, inputs):
    for _ in range(3):
        model(**inputs).loss.backward()


def _twice_the_same(model, table, inputs):
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()


def _hidden_states_alone(model, table, inputs):
    model(**inputs, output_hidden_states=True).hidden_states[-1].square().sum().backward()


def _loss_and_hidden_states(model, table, inputs):
    output = model(**inputs, output_hidden_states=True)
    (output.loss + output.hidden_states[0].square().mean()).backward()


def _asked_for(model, table, inputs):
    (table.grad,) = torch.autograd.grad(model(**inputs).loss, [table])


def _with_a_term_of_its_own(model, table, inputs):
    (model(**inputs).loss + table.square().mean()).backward()


def _autocast(model, table, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()


def _checkpointed_layers(model, table, inputs):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs).loss.backward()
    model.gradient_checkpointing_disable()


def _checkpointed_call(model, table, inputs):
    checkpoint(lambda: model(**inputs).loss, use_reentrant=False).backward()


def _a_model_within_a_model(model, table, inputs):
    """A call in a hook inside of another: the table of each is its own."""
    other = []

    def run(*_):
        if not other:
            other.append(None)
            other.append(model(**inputs).loss)

    handle = model.get_submodule("roberta.encoder").register_forward_hook(run)
    (model(**inputs).loss + other[1]).backward()
    handle.remove()


def _anomalies_looked_for(model, table, inputs):
    with torch.autograd.detect_anomaly(check_nan=True):
        model(**inputs).loss.backward()


def _hooks_of_the_parameter(model, table, inputs):
    seen = []
    handles = [
        table.register_hook(lambda grad: seen.append(grad.clone())),
        table.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone())),
    ]
    model(**inputs).loss.backward()
    assert len(seen) == 2, "once each, with both uses in it"
    assert_same_bits({"hook": seen[0], "after": seen[1]}, {"hook": table.grad, "after": table.grad})
    for handle in handles:
        handle.remove()


USES = {name[1:]: use for name, use in list(globals().items()) if name.startswith("_") and callable(use) and
        getattr(use, "__module__", "") == __name__}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_gradients_are_those_of_two_uses_to_the_bit(use, apart):
    ours, table, inputs, _ = tied(case_of())
    USES[use](ours, table, inputs)
    got = gradients(ours)
    ours.zero_grad()
    with apart():
        USES[use](ours, table, inputs)
    want = gradients(ours)
    assert table.grad.any()
    if use in ("a_model_within_a_model", "with_a_term_of_its_own"):  # autograd adds three in another order
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    else:
        assert_same_bits(got, want)


def test_bfloat16(apart):
    ours, _, inputs, _ = tied(case_of(dtype="bfloat16"))
    ours(**inputs).loss.backward()
    got = gradients(ours)
    ours.zero_grad()
    with apart():
        ours(**inputs).loss.backward()
    assert_same_bits(got, gradients(ours))


def test_padding_has_no_gradient_as_a_word_that_is_looked_up():
    """Of hidden states, in which every padded row counts."""
    ours, table, inputs, _ = tied(case_of())
    padding = ours.config.pad_token_id
    assert (inputs["input_ids"] == padding).any()
    ours(**inputs, output_hidden_states=True).hidden_states[0].square().sum().backward()
    assert not table.grad[padding].any()
    assert table.grad[9].any()


def test_any_number_of_threads():
    ours, table, inputs, _ = tied(case_of())
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ours.zero_grad()
            ours(**inputs).loss.backward()
            found.append(table.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_ids_outside_of_the_table(apart):
    ours, table, inputs, _ = tied(case_of(mask="none"))
    for wrong in (-1, table.shape[0]):
        bad = inputs | {"input_ids": inputs["input_ids"].clone()}
        bad["input_ids"][0, 1] = wrong
        errors = []
        for around in (contextlib.nullcontext, apart):
            with around(), pytest.raises(IndexError, match="index out of range in self") as error:
                ours(**bad)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
        assert str(wrong) in errors[0]


def test_second_derivatives():
    """A penalty on the table's gradient, against the original's."""
    case = case_of(dtype="float32", mask="none")
    original = build(case)
    original.set_attn_implementation("eager")
    ours, _ = loss_only(original)
    inputs = batch_for(case, original.config)
    found = []
    for model in (ours, original):
        table = model.get_input_embeddings().weight
        (grad,) = torch.autograd.grad(model(**inputs).loss, [table], create_graph=True)
        grad.square().sum().backward()
        found.append(table.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_a_hook_on_the_embeddings_is_called(apart):
    ours, _, inputs, report = tied(case_of())
    seen = []
    ours.get_input_embeddings().register_full_backward_hook(lambda *_: seen.append(1))
    ours(**inputs).loss.backward()
    assert seen == [1]
    got = gradients(ours)
    ours.zero_grad()
    with apart():
        ours(**inputs).loss.backward()
    assert_same_bits(got, gradients(ours))
    assert any("Embeddings" in reason for reason in report.fallbacks())


def test_a_table_of_another_kind_is_left_to_autograd():
    """A weight that is computed is no leaf: whoever computes it gets the gradient of both uses."""
    case = case_of(mask="none")
    original = build(case)
    ours, _ = loss_only(original)
    inputs = batch_for(case, original.config)
    found = []
    for model in (ours, original):
        word, decoder = model.get_input_embeddings(), model.get_output_embeddings()
        base = word.weight.detach().clone().requires_grad_()
        for module in (word, decoder):
            del module._parameters["weight"]
        scaled = base * 2.0
        word.weight = decoder.weight = scaled
        model(**inputs).loss.backward()
        found.append(base.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_no_gradient_is_asked_for():
    ours, table, inputs, _ = tied(case_of())
    want = ours(**inputs).loss
    with torch.no_grad():
        assert torch.equal(ours(**inputs).loss, want)
    table.requires_grad_(False)
    loss = ours(**inputs).loss
    assert torch.equal(loss, want)
    loss.backward()
    assert table.grad is None


def test_on_another_backend(apart):
    ours, _, inputs, _ = tied(case_of(), backend="reference")
    ours(**inputs).loss.backward()
    got = gradients(ours)
    ours.zero_grad()
    with apart():
        ours(**inputs).loss.backward()
    for name, want in gradients(ours).items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-6, msg=name)
