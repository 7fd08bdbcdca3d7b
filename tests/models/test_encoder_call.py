"""Inference as one op call on the parameters as they are: when it runs, that it gives the same answers, that no
change of a model goes unnoticed, and that nothing is copied."""

from __future__ import annotations

import copy
import os
import pickle
import threading

import pytest
import torch
from encoder_cases import (
    CALL,
    CHANGES,
    UNCOUNTED,
    calls,
    case_of,
    hidden,
    in_place,
    layers_of,
    layouts,
    named_change,
    pair,
    resident_growth,
)
from model_cases import (
    PREFIX,
    Ops,
    assert_promise,
    batches_for,
    broken_promises,
    build,
    exact_copy,
    in_dtype,
    patched,
    run,
    stay_padded,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset

import roberta_kernels as rk
from roberta_kernels import backends

MISSING = backends.missing_op("cpu", "encoder")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

FAMILIES = tuple(PREFIX)[:10]


def serves(model, inputs):
    return calls(model, inputs).get(CALL, 0)


# --- the same answers -------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers(family, mask, layout):
    case = case_of(family=family, mask=mask)
    original = build(case)
    ours = patched(original, layout=layout)
    batches = batches_for(case, original.config)
    assert_promise(ours, original, batches, what=case, everywhere=True)
    # Of the others positions go on through padding, so that every row is computed.
    one_call = layout == "unpadded" and (mask == "none" or family in FAMILIES[:4])
    for inputs in batches:
        assert serves(ours, inputs) == (1 if one_call else 3)
        assert torch.equal(hidden(ours, inputs), hidden(ours, inputs)), "the same call twice, bit for bit"


@layouts
@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_size": 72, "num_attention_heads": 3},
        {"hidden_size": 128, "num_attention_heads": 1, "intermediate_size": 37},
        {"num_hidden_layers": 1, "layer_norm_eps": 1e-3},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_other_shapes(config, layout):
    case = case_of(config=config)
    original = build(case)
    ours = patched(original, layout=layout)
    batches = batches_for(case, original.config)
    assert_promise(ours, original, batches, what=case)
    assert all(serves(ours, inputs) for inputs in batches)


@pytest.mark.parametrize("head", ["masked_lm", "causal_lm", "single_label", "token", "span", "choice"])
def test_heads(head):
    case = case_of(head)
    original = build(case)
    ours = patched(original)
    options = {"use_cache": False} if head == "causal_lm" else {}
    for inputs in batches_for(case, original.config, 2):
        assert_promise(ours, original, inputs, head=head, **options)
        with torch.no_grad(), Ops() as ops:
            ours(**inputs, **options)
        assert CALL in ops.names


def test_hidden_states_are_those_of_every_layer():
    original, ours, batches = pair()
    assert_promise(ours, original, batches, output_hidden_states=True)
    assert serves(ours, batches[0]) == 1, "recorders that transformers leaves behind are no foreign hooks"


@layouts
@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads, layout):
    original, ours, batches = pair(layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_promise(ours, original, batches)
        assert torch.equal(hidden(ours, batches[0]), hidden(ours, batches[0]))
    finally:
        torch.set_num_threads(before)


class _InTheWorker(Dataset):
    """Item: the threads that torch may use where the loader runs it, and those that a call of the model adds."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs

    def __len__(self):
        return 2

    def __getitem__(self, index):
        before = len(os.listdir("/proc/self/task"))
        out = hidden(self.model, self.inputs)
        return torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before, out


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc, which tells the threads of a process")
def test_a_data_loaders_workers_use_one_thread_each():
    """After the process that they were forked from has used its threads."""
    _, ours, batches = pair()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = hidden(ours, batches[0])
        items = list(DataLoader(_InTheWorker(ours, batches[0]), batch_size=None, num_workers=2, timeout=120))
    finally:
        torch.set_num_threads(before)
    assert len(items) == 2
    for threads, added, out in items:
        assert threads == 1
        assert added == 0
        assert torch.equal(out, want)


@layouts
def test_instruction_sets(layout):
    original, ours, batches = pair(layout)
    inputs = batches[0]
    usual = hidden(ours, inputs)
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa):
            assert_promise(ours, original, batches, what=isa)
            assert serves(ours, inputs)
    assert torch.equal(hidden(ours, inputs), usual)


def test_several_threads_make_the_first_call():
    _, ours, batches = pair()
    want = hidden(copy.deepcopy(ours), batches[0])
    found = []
    workers = [threading.Thread(target=lambda: found.append(hidden(ours, batches[0]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(one, want) for one in found)


# --- when it does not run ---------------------------------------------------------------------------------------------


@layouts
def test_layer_by_layer(layout, monkeypatch):
    """Without it, as with kernels of an old build: the same answers from the fused ops of each layer."""
    monkeypatch.setattr(backends, "missing_op", lambda *_: "left out by a test")
    original, ours, batches = pair(layout)
    assert_promise(ours, original, batches)
    assert not serves(ours, batches[0])
    assert calls(ours, batches[0])


@pytest.mark.parametrize(
    "config", [{"hidden_act": "relu"}, {"hidden_size": 24}, {"chunk_size_feed_forward": 1}], ids=str
)
def test_layers_that_cannot(config):
    case = case_of(config=config)
    original = build(case)
    ours = patched(original)
    batches = batches_for(case, original.config, 2)
    assert_promise(ours, original, batches)
    assert not serves(ours, batches[0])


@layouts
def test_layers_that_differ(layout):
    """One of them cannot, and the others have different epsilons: each layer by itself."""
    original, _, batches = pair()
    layers_of(original)[0].intermediate.intermediate_act_fn = nn.ReLU()
    for norm in (layers_of(original)[1].output.LayerNorm, layers_of(original)[1].attention.output.LayerNorm):
        norm.eps = 0.1
    ours = patched(original, layout=layout)
    assert_promise(ours, original, batches)
    assert serves(ours, batches[0]) == 2


@layouts
def test_norms_of_a_layer_that_differ(layout):
    original, _, batches = pair()
    layers_of(original)[1].output.LayerNorm.eps = 0.5
    ours = patched(original, layout=layout)
    assert_promise(ours, original, batches)
    assert serves(ours, batches[0]) == 2


@layouts
def test_gradients(layout):
    original, ours, batches = pair(layout)
    inputs = batches[0]
    hidden(ours, inputs)
    assert_promise(ours, original, batches, backward=True)
    with Ops() as ops:
        assert ours(**inputs).last_hidden_state.requires_grad
    assert CALL not in ops.names
    ours.requires_grad_(False)
    with Ops() as ops:
        ours(**inputs)
    assert CALL in ops.names, "nothing needs a gradient"
    layers_of(ours)[1].attention.output.LayerNorm.bias.requires_grad_(True)
    with Ops() as ops:
        ours(**inputs).last_hidden_state.sum().backward()
    assert ops.names.count(CALL) == 1, "the first layer needs none"
    assert layers_of(ours)[1].attention.output.LayerNorm.bias.grad is not None


@layouts
def test_embeddings_that_need_a_gradient(layout):
    original, ours, batches = pair(layout)
    inputs = {"attention_mask": batches[0]["attention_mask"]}
    embeds = original.embeddings.word_embeddings(batches[0]["input_ids"]).detach()
    gradients = []
    for model in (original, ours.requires_grad_(False)):
        given = embeds.clone().requires_grad_(True)
        real = model(inputs_embeds=given, **inputs).last_hidden_state[inputs["attention_mask"].bool()]
        real.square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@layouts
@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16", "amx"])
def test_autocast(layout, isa, monkeypatch):
    """On tiles one call too, of bfloat16 products; elsewhere layer by layer."""
    if isa not in backends.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    with backends.use_cpu_isa(isa):
        original, ours, batches = pair(layout)
        exact, draws = exact_copy(original), []
        hidden(ours, batches[0])
        for inputs in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert bool(serves(ours, inputs)) == (isa == "amx")
                results = [run(model, inputs) for model in (ours, original)]
            results.append(run(exact, in_dtype(inputs, torch.float64)))
            assert {name: t.dtype for name, t in results[0].items()} == {
                name: t.dtype for name, t in results[1].items()
            }
            draws.append((*results, inputs["attention_mask"]))
        assert not (broken := broken_promises(draws, dtype=torch.bfloat16)), "\n".join(broken)
        assert serves(ours, batches[0])
        with torch.autocast("cpu", dtype=torch.float16):
            assert not serves(ours, batches[0])
        if isa == "amx":
            return
        got = draws[0][0]["last_hidden_state"]
        monkeypatch.setattr(backends, "missing_op", lambda *_: "left out by a test")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(hidden(patched(original, layout=layout), batches[0]), got)


@pytest.mark.skipif("amx" not in backends.cpu_isas(), reason="this processor has no AMX")
def test_autocast_does_not_depend_on_the_batch():
    _, ours, batches = pair()
    inputs = batches[0]
    lengths = inputs["attention_mask"].sum(1).tolist()
    with backends.use_cpu_isa("amx"), torch.autocast("cpu", dtype=torch.bfloat16):
        together = hidden(ours, inputs)
        for row, length in enumerate(lengths):
            alone = {name: t[row : row + 1, :length] for name, t in inputs.items() if t.dim() == 2}
            assert torch.equal(hidden(ours, alone)[0], together[row, :length])
        with torch.autocast("cpu", enabled=False):
            assert not torch.equal(hidden(ours, inputs), together), "float32 again"


@layouts
def test_inference_mode(layout):
    original, ours, batches = pair(layout)
    with torch.inference_mode():
        inside = ours(**batches[0]).last_hidden_state
    assert torch.equal(inside, hidden(ours, batches[0]))
    assert not any(parameter.is_inference() for parameter in ours.parameters())
    assert_promise(ours, original, batches, backward=True)


@layouts
def test_a_model_made_in_inference_mode(layout):
    """Edits of its weights are not counted."""
    with torch.inference_mode():
        original, ours, batches = pair(layout)
        hidden(ours, batches[0])
        layers_of(ours)[0].output.dense.weight[0, 0] += 1
        layers_of(original)[0].output.dense.weight[0, 0] += 1
        assert_promise(ours, original, batches[0])


@layouts
def test_functional_call(layout):
    original, ours, batches = pair(layout)
    hidden(ours, batches[0])
    other = {name: parameter.detach() * 1.1 for name, parameter in original.named_parameters()}
    with torch.no_grad():
        got, want = (torch.func.functional_call(m, other, (), batches[0]) for m in (ours, original))
    mask = batches[0]["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[mask], want.last_hidden_state[mask], rtol=1e-4, atol=1e-4)
    assert_promise(ours, original, batches)


@layouts
def test_vmap_after_a_call(layout):
    original, ours, batches = pair(layout)
    ids = batches[0]["input_ids"]
    hidden(ours, {"input_ids": ids})
    with torch.no_grad():
        got = torch.func.vmap(lambda row: ours(input_ids=row[None]).last_hidden_state[0])(ids)
    torch.testing.assert_close(got, hidden(original, {"input_ids": ids}), rtol=1e-4, atol=1e-4)


def test_other_backends():
    original, ours, batches = pair()
    hidden(ours, batches[0])
    with rk.backend("reference"):
        assert not serves(ours, batches[0])
        assert_promise(ours, original, batches)
    assert serves(ours, batches[0])
    own = patched(original, backend="reference")
    assert not serves(own, batches[0])


def test_compiled_layers():
    _, ours, batches = pair()
    want = hidden(ours, batches[0])
    graphs = []
    for layer in layers_of(ours):
        layer.compile(backend=lambda graph, example: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(hidden(ours, batches[0]), want, rtol=1e-4, atol=1e-5)
    assert graphs, "what the user compiled runs"


def test_traced():
    original, ours, batches = pair()
    inputs = batches[0]
    hidden(ours, inputs)
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        got = torch.compile(ours, backend=keep, fullgraph=True)(**inputs).last_hidden_state
    assert len(graphs) == 1
    assert "roberta_kernels_cpu.encoder" not in graphs[0].code
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[mask], hidden(original, inputs)[mask], rtol=1e-4, atol=1e-5)


# --- what happens to weights and modules between two calls ------------------------------------------------------------


@layouts
@pytest.mark.parametrize("change", [*CHANGES, *UNCOUNTED], ids=named_change)
def test_a_change_is_noticed(change, layout):
    """At once, and exactly: bit for bit as a model that was like that before it was patched."""
    original, ours, batches = pair(layout)
    inputs = batches[0]
    mask = inputs["attention_mask"].bool()
    before = hidden(ours, inputs)
    assert serves(ours, inputs)
    for model in (original, ours):
        change(model)
    after = hidden(ours, inputs)
    assert (after - before).abs().max() > 1e-3, "the change changes nothing"
    torch.testing.assert_close(after[mask], hidden(original, inputs)[mask], rtol=2e-5, atol=2e-5)
    rk.patch(original)
    if layout == "padded":
        stay_padded(original)
    assert torch.equal(after, hidden(original, inputs))
    assert torch.equal(after, hidden(ours, inputs))


@layouts
@pytest.mark.parametrize("where", [0, -1, None], ids=["first", "last", "anywhere"])
def test_any_element_of_any_parameter_of_a_layer(where, layout):
    """One at a time, through `.data`, which torch does not count: and back, to the same bits."""
    original, ours, batches = pair(layout)
    inputs = batches[0]
    mask = inputs["attention_mask"].bool()
    before = hidden(ours, inputs)
    names = [name for name, _ in original.named_parameters() if ".layer.1." in name]
    assert len(names) == 16
    for name in names:
        edited = [model.get_parameter(name).data.view(-1) for model in (ours, original)]
        at = torch.randint(len(edited[0]), ()).item() if where is None else where
        kept = edited[0][at].item()
        for values in edited:
            values[at] += 8
        after = hidden(ours, inputs)
        assert serves(ours, inputs)
        if not name.endswith("key.bias"):  # a softmax does not see it
            assert not torch.equal(after, before), name
        torch.testing.assert_close(after[mask], hidden(original, inputs)[mask], rtol=1e-4, atol=1e-4, msg=name)
        for values in edited:
            values[at] = kept
        assert torch.equal(hidden(ours, inputs), before), name


@layouts
def test_a_global_hook_is_noticed(layout):
    _, ours, batches = pair(layout)
    hidden(ours, batches[0])
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        hidden(ours, batches[0])
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3 * 6 + 1, "every product and the pooler's"
    assert serves(ours, batches[0])


def test_a_padded_call_after_an_unpadded_one():
    original, ours, batches = pair()
    hidden(ours, batches[0])
    with torch.no_grad(), Ops() as ops:
        ours(**batches[1], output_hidden_states=True)
    assert ops.names.count(CALL) == 3
    assert_promise(ours, original, batches[1], output_hidden_states=True)
    assert calls(ours, batches[0])[CALL] == 1


@pytest.mark.parametrize("module", ["layer", "attention.self", "output.dropout"])
def test_training_mode_of_a_part(module):
    original, ours, batches = pair()
    hidden(ours, batches[0])
    parts = [m.get_submodule(f"encoder.layer.1{'' if module == 'layer' else '.' + module}") for m in (original, ours)]
    for part in parts:
        part.training = True
    assert serves(ours, batches[0]) == 2
    assert_promise(ours, original, batches)
    parts[1].training = False
    assert serves(ours, batches[0]) == 1


def test_training_in_between_learns_the_same():
    original, ours, batches = pair()
    hidden(ours, batches[0])
    ours.train()
    fresh = patched(original).train()
    for model in (ours, fresh):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for inputs in batches:
            torch.manual_seed(0)
            model(**inputs).last_hidden_state.square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True))
    ours.eval()
    rk.unpatch(fresh)
    assert_promise(ours, fresh.eval(), batches)
    assert serves(ours, batches[0]) == 1


def test_unpatch_leaves_nothing():
    original, ours, batches = pair()
    hidden(ours, batches[0])
    rk.unpatch(ours)
    assert not any(name.startswith("_rk") for module in ours.modules() for name in module.__dict__)
    assert torch.equal(hidden(ours, batches[0]), hidden(original, batches[0]))


def test_adapters_attached_later():
    peft = pytest.importorskip("peft", reason="needs roberta_kernels[test]")
    original, ours, batches = pair()
    hidden(ours, batches[0])
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    outputs = []
    for model in (original, ours):
        torch.manual_seed(3)
        outputs.append(peft.get_peft_model(model, config).eval())
    assert_promise(outputs[1], outputs[0], batches)
    assert not serves(outputs[1], batches[0])
    outputs = [model.merge_and_unload() for model in outputs]
    assert_promise(outputs[1], outputs[0], batches)
    assert serves(outputs[1], batches[0]) == 1


# --- nothing is copied ------------------------------------------------------------------------------------------------


def test_nothing_of_it_is_copied_or_saved(tmp_path):
    _, ours, batches = pair()
    size, names = len(pickle.dumps(ours)), list(ours.state_dict())
    pointers = [parameter.data_ptr() for parameter in ours.parameters()]
    ours.save_pretrained(tmp_path / "before")
    want = hidden(ours, batches[0])
    assert [parameter.data_ptr() for parameter in ours.parameters()] == pointers
    assert len(pickle.dumps(ours)) < size + 1500
    assert list(ours.state_dict()) == names
    ours.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(hidden(copied, batches[0]), want)
        in_place(copied)
        assert not torch.equal(hidden(copied, batches[0]), want)
    assert torch.equal(hidden(ours, batches[0]), want)


@pytest.mark.parametrize(
    ("layers", "loaded"),
    [(2, False), pytest.param(6, True, marks=pytest.mark.full)],
    ids=["made", "from_pretrained"],
)
def test_no_call_makes_a_copy_of_a_weight(layers, loaded, tmp_path):
    """The process is as large after calls of the patched model as after those of the original."""
    inference, unpatched = resident_growth(None, None, tmp_path / "model" if loaded else None, layers)
    assert abs(inference) < 0.2
    assert abs(unpatched) < 0.2


# --- options of former versions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [({"prepack": True}, "prepack"), ({"prepack": False}, "prepack"), ({"offload": True}, "offload")],
)
def test_options_without_effect_are_accepted_with_a_warning(options, word):
    original, ours, batches = pair()
    want = hidden(ours, batches[0])
    other = copy.deepcopy(original)
    with pytest.warns(FutureWarning, match=f"{word} has no effect") as warned:
        rk.patch(other, **options)
    assert len(warned) == 1
    assert warned[0].filename == __file__, "it points to the call"
    assert torch.equal(hidden(other, batches[0]), want)
    assert serves(other, batches[0]) == 1
    with pytest.warns(FutureWarning, match=f"{word} has no effect"), rk.patch_transformers(**options):
        made = type(original)(original.config).eval()
    made.load_state_dict(original.state_dict())
    assert torch.equal(hidden(made, batches[0]), want)


def test_prepack_must_be_true_or_false():
    model = build(case_of())
    for call in (lambda: rk.patch(model, prepack=None), lambda: rk.patch_transformers(prepack=None)):
        with pytest.raises(ValueError, match="prepack must be True or False, got None"):
            call()
    assert not rk.is_patched(model)
