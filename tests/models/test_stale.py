"""Quantised copies are never used for long after their weights changed: at once where torch counts the change, after
some calls where it does not, and after `refresh` in any case."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from encoder_cases import CALL, PACK, PACKED_CALL, SMALL, calls, case_of, hidden, in_place, layers_of, layouts, pair
from model_cases import build, patched

import roberta_kernels as rk
from roberta_kernels import backends, quantized
from roberta_kernels.quantized import copies

MISSING = backends.missing_op("cpu", "encoder")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

FEW = 8
IDS = torch.tensor([[2, 7, 9, 11]])
offloads = pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])


def weights_of(layer):
    core = layer.attention.self
    linears = (core.query, core.key, core.value, layer.attention.output.dense, layer.intermediate.dense)
    return [linear.weight for linear in (*linears, layer.output.dense)]


def through_data(weight):
    return weight.data


def through_numpy(weight):
    return torch.from_numpy(weight.detach().numpy())


def edits(weight):
    """One element, one row, one column; at both ends and inside."""
    rows, columns = weight.shape
    yield from ((0, 0), (rows - 1, columns - 1), (rows // 2, 3))
    yield from ((row, slice(None)) for row in (0, rows - 1))
    yield from ((slice(None), column) for column in (0, columns - 1))


def calls_until_seen(model, limit):
    """How many calls still ran all layers from the copies."""
    inputs = {"input_ids": IDS}
    for count in range(limit + 2):
        if CALL in calls(model, inputs):
            return count
    return limit + 2


@offloads
@pytest.mark.parametrize("way", [through_data, through_numpy], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", range(6), ids=["query", "key", "value", "attention output", "inner", "output"])
def test_any_edit_is_seen(kind, way, offload, monkeypatch):
    monkeypatch.setattr(copies, "CALLS_UNTIL_SEEN", FEW)
    _, ours, _ = pair(quantization="int8", offload=offload)
    inputs = {"input_ids": IDS}
    hidden(ours, inputs)
    weight = weights_of(layers_of(ours)[kind % 3])[kind]
    for place in edits(weight):
        assert PACKED_CALL in calls(ours, inputs)
        versions = weight._version
        way(weight)[place] += 3
        assert weight._version == versions, "torch counted it, and this tests nothing"
        assert calls_until_seen(ours, FEW) < FEW, place
        hidden(ours, inputs)
    fresh = build(case_of())
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(hidden(ours, inputs), hidden(patched(fresh, quantization="int8"), inputs))


@layouts
def test_the_stated_number_of_calls(layout):
    _, ours, _ = pair(layout, quantization="int8", offload=False)
    inputs = {"input_ids": IDS}
    for _ in range(3):
        hidden(ours, inputs)
    weights_of(layers_of(ours)[1])[4].data[0, 0] += 3  # in the part that was looked at first, and will be last
    for _ in range(copies.CALLS_UNTIL_SEEN - 5):
        hidden(ours, inputs)
    assert 1 <= calls_until_seen(ours, 5) < 5


@offloads
def test_refresh(offload):
    original, ours, batches = pair(quantization="int8", offload=offload)
    before = hidden(ours, batches[0])
    for model in (original, ours):
        weights_of(layers_of(model)[2])[5].data[:, 17] *= -8
        weights_of(layers_of(model)[0])[3].detach().numpy()[63, 1] += 8
    rk.refresh(ours)
    after = hidden(ours, batches[0])
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(after, hidden(patched(original, quantization="int8"), batches[0]))


def test_refresh_of_anything_else():
    original, ours, batches = pair()
    want = hidden(ours, batches[0])
    for model in (original, ours, torch.nn.Linear(2, 2)):
        rk.refresh(model)
    assert torch.equal(hidden(ours, batches[0]), want)


def test_an_edit_that_one_layout_sees_is_seen_by_the_other(monkeypatch):
    monkeypatch.setattr(copies, "CALLS_UNTIL_SEEN", 1)
    _, ours, batches = pair(quantization="int8")
    left = {name: tensor.clone() for name, tensor in batches[0].items()}
    left["attention_mask"][:, 0] = 0
    for inputs in (batches[0], left):
        assert PACKED_CALL in calls(ours, inputs)
    weights_of(layers_of(ours)[1])[0].data[0, 0] += 3
    hidden(ours, left)
    hidden(ours, left)  # copied again, by the layers
    got = hidden(ours, batches[0])
    rk.refresh(ours)
    assert torch.equal(got, hidden(ours, batches[0]))


def test_an_edit_of_another_process(monkeypatch):
    """Weights in shared memory stay there, offloading or not, and their bytes are looked at."""
    monkeypatch.setattr(copies, "CALLS_UNTIL_SEEN", 1)
    _, ours, _ = pair(quantization="int8")
    ours.share_memory()
    inputs = {"input_ids": IDS}
    before = hidden(ours, inputs)
    child = os.fork()
    if child == 0:
        weights_of(layers_of(ours)[1])[4].detach().numpy()[:] *= 2
        os._exit(0)
    os.waitpid(child, 0)
    hidden(ours, inputs)
    after = hidden(ours, inputs)
    assert (after - before).abs().max() > 1e-3
    rk.refresh(ours)
    assert torch.equal(after, hidden(ours, inputs))


# --- weights that keep changing ---------------------------------------------------------------------------------------


def counted_edit(model):
    in_place(model)


def uncounted_edit(model):
    layers_of(model)[1].intermediate.dense.weight.data.mul_(1.01)


def there_and_back(model):
    model.train()
    model.eval()


@pytest.mark.parametrize("change", [counted_edit, uncounted_edit, there_and_back], ids=lambda f: f.__name__)
def test_nothing_is_packed_for_one_use(change, monkeypatch):
    trimmed = []
    _, ours, batches = pair(quantization="int8")
    report = rk.patch(ours, quantization="int8")
    hidden(ours, batches[0])
    monkeypatch.setattr(quantized, "trim", lambda: trimmed.append(True))
    monkeypatch.setattr(quantized.quantized_call, "trim", lambda: trimmed.append(True))
    for _ in range(5):
        change(ours)
        ran = calls(ours, batches[0])
        assert PACK not in ran
        assert PACKED_CALL not in ran
        assert ran[CALL] == 1
    assert len(trimmed) <= 1
    reasons = [reason for reason in report.fallbacks() if "they were changed" in reason]
    assert report.fallbacks()[reasons[0]] == 5 * SMALL["num_hidden_layers"]
    assert PACKED_CALL in calls(ours, batches[0])
    assert PACK not in calls(ours, batches[0])


def test_the_first_call_is_quantised():
    """So that no answer of a model that nobody changes differs from the next."""
    _, ours, batches = pair(quantization="int8")
    assert torch.equal(hidden(ours, batches[0]), hidden(ours, batches[0]))


# --- threads ----------------------------------------------------------------------------------------------------------


def in_threads(work, count=3):
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, errors


@offloads
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_load_state_dict_while_others_infer(assign, offload):
    original, ours, batches = pair(quantization="int8", offload=offload)
    hidden(ours, batches[0])
    ended = threading.Event()

    def infer():
        while not ended.is_set():
            hidden(ours, batches[0])

    threads, errors = in_threads(infer)
    try:
        for factor in (1.1, 0.8, 1.3, 0.9):
            state = {name: value * factor for name, value in original.state_dict().items()}
            ours.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not errors
    original.load_state_dict(state)
    hidden(ours, batches[0])
    assert torch.equal(hidden(ours, batches[0]), hidden(patched(original, quantization="int8"), batches[0]))


def test_a_copy_made_during_a_change_is_not_kept(monkeypatch):
    original, ours, batches = pair(quantization="int8", offload=False)
    move = copies.checksums

    def writes_meanwhile(weights, *args):
        found = move(weights, *args)
        with torch.no_grad():
            weights[0].mul_(1.5)
        return found

    monkeypatch.setattr(copies, "checksums", writes_meanwhile)
    assert PACKED_CALL not in calls(ours, batches[0])
    monkeypatch.undo()
    for _ in range(2):
        hidden(ours, batches[0])
    original.load_state_dict(ours.state_dict())
    assert torch.equal(hidden(ours, batches[0]), hidden(patched(original, quantization="int8"), batches[0]))


# --- conversion by swapping -------------------------------------------------------------------------------------------


@offloads
def test_swap_tensors(offload):
    original, ours, batches = pair(quantization="int8", offload=offload)
    hidden(ours, batches[0])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        ours.double()
        real = batches[0]["attention_mask"].bool()
        got, want = (hidden(model, batches[0])[real] for model in (ours, original.double()))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        ours.float()
        state = {name: value * 1.2 for name, value in original.float().state_dict().items()}
        for model in (original, ours):
            model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for _ in range(2):
        hidden(ours, batches[0])
    assert PACKED_CALL in calls(ours, batches[0])
    assert torch.equal(hidden(ours, batches[0]), hidden(patched(original, quantization="int8"), batches[0]))
    rk.unpatch(ours)
    assert torch.equal(hidden(ours, batches[0]), hidden(original, batches[0]))
