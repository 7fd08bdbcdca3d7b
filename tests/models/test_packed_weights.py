"""Inference from packed weights: when it serves, that it gives the same answers, and that nothing goes unnoticed."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref

import pytest
import torch
from model_cases import (
    PREFIX,
    Case,
    Ops,
    assert_promise,
    batch_for,
    batches_for,
    build,
    exact_copy,
    log,
    logged,
    patched,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, Dataset
from transformers import RobertaModel

import roberta_kernels as rk
from roberta_kernels import backends, tolerance
from roberta_kernels.prepacked import QUANTIZATIONS, offloading, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

FAMILIES = tuple(PREFIX)[:9]
SMALL = {
    **{"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3},
    **{"intermediate_size": 96, "hidden_act": "gelu", "type_vocab_size": 1},
}
LAYOUTS = {"packed": "auto", "padded": False}
layouts = pytest.mark.parametrize("packed", LAYOUTS.values(), ids=LAYOUTS)
quantizations = pytest.mark.parametrize("quantization", QUANTIZATIONS)
CALL = "roberta_kernels_cpu::packed_encoder"
PACK = "roberta_kernels_cpu::pack_weight"


def case_of(head="pooler", **kwargs):
    return Case(seed=4, head=head, config=SMALL | kwargs.pop("config", {}), **kwargs)


def pair(packed="auto", **options):
    """A model, a patched copy of it, and batches."""
    case = case_of()
    original = build(case)
    return original, patched(original, packed=packed, **options), batches_for(case, original.config, 2)


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def calls(model, inputs):
    """How often each op of the package ran in one call."""
    with Ops() as ops:
        hidden(model, inputs)
    return {name: ops.names.count(name) for name in ops.names if name.startswith("roberta_kernels_cpu")}


def serves(model, inputs):
    return calls(model, inputs).get(CALL, 0)


def layers_of(model):
    return model.base_model.encoder.layer


def kept(model):
    """The packed weights that the model keeps."""
    found = (module.__dict__.get("_rk_memory") for module in model.modules())
    layers = [memory.prepacked for memory in found if memory and memory.prepacked]
    return [tensor for layer in layers for tensor in layer.copies or ()]


# --- the same answers -------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers(family, mask, packed):
    case = case_of(family=family, mask=mask)
    original = build(case)
    ours = patched(original, packed=packed)
    batches = batches_for(case, original.config)
    assert_promise(ours, original, batches, what=case)
    one_call = packed == "auto" and mask != "left"
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
def test_other_shapes(config, packed):
    case = case_of(config=config)
    original = build(case)
    ours = patched(original, packed=packed)
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
def test_threads(threads, packed):
    original, ours, batches = pair(packed)
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
def test_instruction_sets(packed):
    original, ours, batches = pair(packed)
    inputs = batches[0]
    usual = hidden(ours, inputs)
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa):
            assert calls(ours, inputs).get(PACK, 0) == (0 if isa == backends.CPU_ISAS[-1] else 12) or isa == NATIVE
            assert_promise(ours, original, batches, what=isa)
            assert serves(ours, inputs)
    assert torch.equal(hidden(ours, inputs), usual)


NATIVE = backends.cpu_isa() if backends.cpu_isas() else ""


def test_several_threads_make_the_first_call():
    _, ours, batches = pair(offload=True)
    want = hidden(copy.deepcopy(ours), batches[0])
    found = []
    workers = [threading.Thread(target=lambda: found.append(hidden(ours, batches[0]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(one, want) for one in found)


# --- when it does not serve -------------------------------------------------------------------------------------------


@layouts
def test_prepack_false(packed):
    original, ours, batches = pair(packed, prepack=False)
    assert_promise(ours, original, batches)
    assert not serves(ours, batches[0])
    assert not kept(ours)


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
def test_layers_that_differ(packed):
    """One of them cannot, and the others have different epsilons: each layer by itself."""
    original, _, batches = pair()
    layers_of(original)[0].intermediate.intermediate_act_fn = nn.ReLU()
    for norm in (layers_of(original)[1].output.LayerNorm, layers_of(original)[1].attention.output.LayerNorm):
        norm.eps = 0.1
    ours = patched(original, packed=packed)
    assert_promise(ours, original, batches)
    assert serves(ours, batches[0]) == 2


@layouts
def test_norms_of_a_layer_that_differ(packed):
    original, _, batches = pair()
    layers_of(original)[1].output.LayerNorm.eps = 0.5
    ours = patched(original, packed=packed)
    assert_promise(ours, original, batches)
    assert serves(ours, batches[0]) == 2


@layouts
def test_gradients(packed):
    original, ours, batches = pair(packed)
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
def test_embeddings_that_need_a_gradient(packed):
    original, ours, batches = pair(packed)
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
def test_autocast(packed):
    _, ours, batches = pair(packed)
    plain = copy.deepcopy(ours)
    rk.patch(plain, packed=packed, prepack=False)
    hidden(ours, batches[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not serves(ours, batches[0])
        assert torch.equal(hidden(ours, batches[0]), hidden(plain, batches[0]))
    assert serves(ours, batches[0])


@layouts
def test_inference_mode(packed):
    original, ours, batches = pair(packed, offload=True)
    with torch.inference_mode():
        inside = ours(**batches[0]).last_hidden_state
    assert torch.equal(inside, hidden(ours, batches[0]))
    assert not any(parameter.is_inference() for parameter in ours.parameters())
    assert_promise(ours, original, batches, backward=True)


@layouts
def test_a_model_made_in_inference_mode(packed):
    """Edits of its weights are not counted, so that packed copies would not notice them."""
    with torch.inference_mode():
        original, ours, batches = pair(packed)
        assert not serves(ours, batches[0])
        layers_of(ours)[0].output.dense.weight[0, 0] += 1
        layers_of(original)[0].output.dense.weight[0, 0] += 1
        torch.testing.assert_close(*(m(**batches[0]).last_hidden_state[:, 0] for m in (ours, original)))


@layouts
def test_functional_call(packed):
    original, ours, batches = pair(packed)
    hidden(ours, batches[0])
    other = {name: parameter.detach() * 1.1 for name, parameter in original.named_parameters()}
    with torch.no_grad():
        got, want = (torch.func.functional_call(m, other, (), batches[0]) for m in (ours, original))
    mask = batches[0]["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[mask], want.last_hidden_state[mask], rtol=1e-4, atol=1e-4)
    assert_promise(ours, original, batches)


@layouts
def test_vmap_after_a_call(packed):
    original, ours, batches = pair(packed)
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
    assert "packed_encoder" not in graphs[0].code
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[mask], hidden(original, inputs)[mask], rtol=1e-4, atol=1e-5)


# --- what happens to weights and modules between two calls ------------------------------------------------------------


def optimiser_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.02).step()


def loaded(assign):
    def change(model):
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=assign)

    return change


def in_place(model):
    with torch.no_grad():
        layers_of(model)[1].intermediate.dense.weight.mul_(1.2)


def one_element(model):
    with torch.no_grad():
        layers_of(model)[1].intermediate.dense.weight[7, 5] += 8


def through_data(model):
    layers_of(model)[1].intermediate.dense.weight.data.mul_(1.2)


def through_numpy(model):
    layers_of(model)[1].attention.self.value.weight.detach().numpy()[:] *= 1.2


def other_data(model):
    weight = layers_of(model)[1].attention.output.dense.weight
    weight.data = weight.data * 1.2


def turned_data(model):
    weight = layers_of(model)[1].attention.self.value.weight
    weight.data = weight.data.t()


def other_parameter(model):
    dense = layers_of(model)[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 1.2)


def other_module(model):
    core = layers_of(model)[1].attention.self
    core.query = copy.deepcopy(core.query)
    in_place_of(core.query)


def in_place_of(linear):
    with torch.no_grad():
        linear.weight.mul_(1.5)
        linear.bias.add_(0.5)


def other_class(model):
    class Louder(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.2

    layers_of(model)[1].intermediate.dense.__class__ = Louder


def bias(model):
    with torch.no_grad():
        layers_of(model)[1].intermediate.dense.bias.add_(0.3)


def other_norm(model):
    norm = layers_of(model)[1].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 1.2)
    norm.bias.data = norm.bias.data + 0.2


def epsilon(model):
    for layer in layers_of(model):
        layer.output.LayerNorm.eps = layer.attention.output.LayerNorm.eps = 0.5


def scaling(model):
    for layer in layers_of(model):
        layer.attention.self.scaling = 0.5


def activation(model):
    for layer in layers_of(model):
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def reordered(model):
    model.encoder.layer = nn.ModuleList([model.encoder.layer[i] for i in (2, 0, 1)])


def one_more_layer(model):
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def one_layer_less(model):
    del model.encoder.layer[0]


def half_precision_and_back(model):
    model.bfloat16().float()


def pruned(model):
    prune.l1_unstructured(layers_of(model)[1].output.dense, "weight", amount=0.5)


def parametrised(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 1.3

    parametrize.register_parametrization(layers_of(model)[1].output.dense, "weight", Twice())


def forward_bound(model):
    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x)) * 1.2

    intermediate = layers_of(model)[1].intermediate
    intermediate.forward = types.MethodType(forward, intermediate)


def forward_hook(model):
    layers_of(model)[1].intermediate.register_forward_hook(lambda module, args, output: output * 1.2)


def forward_pre_hook(model):
    layers_of(model)[1].attention.self.key.register_forward_pre_hook(lambda module, args: (args[0] * 1.2,))


def layer_hook(model):
    layers_of(model)[1].register_forward_hook(lambda module, args, output: output * 1.2)


def encoder_hook(model):
    model.encoder.register_forward_pre_hook(lambda module, args: (args[0] * 1.2, *args[1:]))


CHANGES = (
    *(optimiser_step, in_place, through_data, through_numpy, other_data, turned_data, other_parameter, other_module),
    *(
        one_element,
        other_class,
        bias,
        other_norm,
        epsilon,
        scaling,
        activation,
        reordered,
        one_more_layer,
        one_layer_less,
    ),
    *(half_precision_and_back, pruned, parametrised, forward_bound, forward_hook, forward_pre_hook, layer_hook),
    encoder_hook,
)


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
@layouts
@pytest.mark.parametrize(
    "change",
    [*CHANGES, loaded(False), loaded(True)],
    ids=[*(change.__name__ for change in CHANGES), "load_state_dict", "load_state_dict, assign"],
)
def test_a_change_is_noticed(change, packed, offload):
    original, ours, batches = pair(packed, offload=offload)
    before = hidden(ours, batches[0])
    assert serves(ours, batches[0])
    change(original)
    change(ours)
    after = hidden(ours, batches[0])
    assert (after - before).abs().max() > 1e-3, "the change changes nothing"
    mask = batches[0]["attention_mask"].bool()
    torch.testing.assert_close(after[mask], hidden(original, batches[0])[mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(hidden(ours, batches[0]), after)


@layouts
def test_a_global_hook_is_noticed(packed):
    _, ours, batches = pair(packed)
    hidden(ours, batches[0])
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        hidden(ours, batches[0])
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3 * 6 + 1, "every product and the pooler's"
    assert serves(ours, batches[0])


def test_only_what_changed_is_packed_again():
    _, ours, batches = pair()
    assert calls(ours, batches[0])[PACK] == 3 * 4
    assert PACK not in calls(ours, batches[0])
    in_place(ours)
    assert calls(ours, batches[0])[PACK] == 4
    bias(ours)
    assert PACK not in calls(ours, batches[0]), "biases and norms are read where they are"


def test_a_padded_call_and_a_packed_one_share_the_weights():
    _, ours, batches = pair()
    hidden(ours, batches[0])
    left = batch_for(case_of(mask="left"), ours.config)
    assert calls(ours, left).get(CALL) == 3
    assert PACK not in calls(ours, left)
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


def test_training_frees_the_packed_weights_and_learns_the_same():
    original, ours, batches = pair()
    hidden(ours, batches[0])
    alive = [weakref.ref(tensor) for tensor in kept(ours)]
    assert len(alive) == 12
    ours.train()
    assert not [reference for reference in alive if reference() is not None]
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


def test_unpatch_frees_the_packed_weights():
    original, ours, batches = pair()
    hidden(ours, batches[0])
    alive = [weakref.ref(tensor) for tensor in kept(ours)]
    rk.unpatch(ours)
    assert not [reference for reference in alive if reference() is not None]
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


# --- copies and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"quantization": "int8"}], ids=str)
def test_nothing_of_it_is_copied_or_saved(options, tmp_path):
    _, ours, batches = pair(**options)
    size, names = len(pickle.dumps(ours)), list(ours.state_dict())
    ours.save_pretrained(tmp_path / "before")
    want = hidden(ours, batches[0])
    assert kept(ours)
    assert len(pickle.dumps(ours)) < size + 1500
    assert list(ours.state_dict()) == names
    ours.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert not kept(copied)
        assert torch.equal(hidden(copied, batches[0]), want)
        in_place(copied)
        assert not torch.equal(hidden(copied, batches[0]), want)
    assert torch.equal(hidden(ours, batches[0]), want)


# --- quantised --------------------------------------------------------------------------------------------------------


def rounded(weight, quantization):
    if quantization == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    if quantization == "int8":  # a scale for every 32 elements of a row
        return torch.cat([rounded(group, "int8-dynamic") for group in weight.split(32, 1)], 1)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def round_activations(module, args):
    """Each row to 255 steps between its least and its largest value."""
    x = args[0]
    least, largest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (largest - least) / 255
    zero = (-least / step).round()
    return ((((x / step).round() + zero).clamp(0, 255) - zero) * step,)


def quantised_by_hand(model, quantization):
    """The model with the weights of its layers rounded, in the dtype that they have."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in layers_of(model).modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, quantization))
                if quantization == "int8-dynamic":
                    module.register_forward_pre_hook(round_activations)
    return model


@layouts
@pytest.mark.parametrize("family", ["roberta", "bert", "electra"])
@quantizations
def test_the_error_is_what_rounding_the_weights_implies(quantization, family, packed):
    case = case_of(family=family)
    original = build(case)
    ours = patched(original, packed=packed, quantization=quantization)
    by_hand = quantised_by_hand(original, quantization)
    batches = batches_for(case, original.config)
    if quantization != "int8-dynamic":
        assert_promise(ours, by_hand, batches)
    for inputs in batches:
        mask = inputs["attention_mask"].bool()
        exact = hidden(exact_copy(original), inputs)[mask]
        compared = tolerance.compare(hidden(ours, inputs)[mask], hidden(by_hand, inputs)[mask], exact)
        assert compared.rms_error <= 1.5 * compared.rms_error_original, str(compared)
        assert compared.rms_error >= 0.5 * compared.rms_error_original, "the weights are not rounded"
        assert torch.equal(hidden(ours, inputs), hidden(ours, inputs))


@quantizations
def test_instruction_sets_quantised(quantization):
    original, ours, batches = pair(quantization=quantization)
    by_hand = quantised_by_hand(original, quantization)
    exact, mask = hidden(exact_copy(original), batches[0]), batches[0]["attention_mask"].bool()
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa):
            got, want = hidden(ours, batches[0]), hidden(by_hand, batches[0])
            compared = tolerance.compare(got[mask], want[mask], exact[mask], name=isa)
            assert 0.5 < compared.rms_error / compared.rms_error_original < 1.5, str(compared)


@quantizations
def test_the_saved_weights_are_the_original_ones(quantization, tmp_path):
    original, ours, batches = pair(quantization=quantization)
    hidden(ours, batches[0])
    ours.save_pretrained(tmp_path)
    saved, want = load_file(tmp_path / "model.safetensors"), original.state_dict()
    assert all(torch.equal(saved[name], want[name]) for name in saved)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))


@quantizations
def test_the_report_says_so(quantization):
    model = build(case_of())
    report = rk.patch(model, quantization=quantization)
    assert report.quantization == quantization
    assert f"{quantization} weights" in str(report)
    assert rk.patch(model).quantization is None


WAYS = {
    "gradients are needed": lambda model, inputs: model(**inputs),
    "training mode": lambda model, inputs: hidden(model.train(), inputs),
    "the original attention runs": lambda model, inputs: hidden(model, inputs | {"output_attentions": True}),
    "autocast": lambda model, inputs: hidden(model, inputs),
    "another backend": lambda model, inputs: hidden(model, inputs),
}


@pytest.mark.parametrize("why", WAYS)
def test_float32_weights_are_reported(why):
    original, ours, batches = pair()
    original.config._attn_implementation = ours.config._attn_implementation = "eager"
    report = rk.patch(ours, quantization="int8")
    hidden(ours, batches[0])
    assert report.fallbacks() == {}
    call = WAYS[why]
    with log() as messages:
        for _ in range(2):
            backend = rk.backend("reference" if why == "another backend" else "auto")
            with backend, torch.autocast("cpu", enabled=why == "autocast"):
                got = call(ours, batches[0])
    assert len([message for message in messages if "float32 weights" in message]) == 1, "said once"
    reasons = [reason for reason in report.fallbacks() if "float32 weights" in reason]
    assert len(reasons) == 1
    assert why in reasons[0]
    assert report.fallbacks()[reasons[0]] == 2 * 3
    got = getattr(got, "last_hidden_state", got)
    plain = patched(original).train(ours.training)
    with torch.autocast("cpu", enabled=why == "autocast"):
        want = hidden(plain, batches[0])
    mask = batches[0]["attention_mask"].bool()
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=1e-5 if why != "autocast" else 0.1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantization": "int4"}, "quantization must be None or one of .*, got 'int4'"),
        ({"quantization": True}, "quantization must be .*, got True"),
        ({"quantization": "float32"}, "quantization must be .*, got 'float32'"),
        ({"offload": "yes"}, "offload must be .*, got 'yes'"),
        ({"prepack": None}, "prepack must be True or False, got None"),
        ({"prepack": False, "quantization": "int8"}, "prepack must be True"),
        ({"prepack": False, "offload": True}, "prepack must be True"),
        ({"backend": "reference", "quantization": "int8"}, "backend must be auto or cpu with .*, got 'reference'"),
    ],
    ids=str,
)
def test_bad_options(options, error):
    model = build(case_of())
    for call in (lambda: rk.patch(model, **options), lambda: rk.patch_transformers(**options)):
        with pytest.raises(ValueError, match=error):
            call()
    assert not rk.is_patched(model)
    with pytest.raises(ValueError, match="needs a float32 model on a CPU"):
        rk.patch(model.bfloat16(), quantization="int8")
    assert not rk.is_patched(model)


def test_without_compiled_kernels(monkeypatch):
    from roberta_kernels import prepacked

    monkeypatch.setattr(prepacked, "unavailable", lambda: "not compiled")
    original, ours, batches = pair()
    assert_promise(ours, original, batches)
    assert not serves(ours, batches[0])
    with pytest.raises(rk.BackendError, match="needs the compiled CPU kernels: not compiled"):
        rk.patch(ours, quantization="int8")


def test_models_that_are_made_quantised():
    case = case_of()
    plain = build(case)
    with rk.patch_transformers(quantization="int8"):
        model = type(plain)(plain.config).eval()
        with torch.device("meta"):
            type(plain)(plain.config)
    assert model._rk_state.options.quantization == "int8"
    model.load_state_dict(plain.state_dict())
    inputs = batch_for(case, plain.config)
    assert torch.equal(hidden(model, inputs), hidden(patched(plain, quantization="int8"), inputs))


def test_a_model_without_such_layers_is_not_quantised():
    model = build(case_of(family="xmod"))
    with logged("is not quantised"):
        report = rk.patch(model, quantization="int8")
    assert any("not quantised" in left.reason for left in report.left)


# --- weights out of memory --------------------------------------------------------------------------------------------


def mapped(model):
    return [
        parameter
        for module in model.modules()
        if (memory := module.__dict__.get("_rk_memory")) and memory.prepacked
        for parameter in module.parameters()
        if parameter in memory.prepacked.offloaded
    ]


@layouts
def test_offloaded_weights_are_what_they_were(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    original, ours, batches = pair(packed, quantization="int8")
    parameters = dict(ours.named_parameters())
    views = {name: parameter._version for name, parameter in parameters.items()}
    want = hidden(ours, batches[0])
    assert len(mapped(ours)) == 3 * 6
    assert not list(tmp_path.iterdir()), "the files have no names"
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    assert {name: parameter._version for name, parameter in ours.named_parameters()} == views
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))

    in_place(ours)
    assert not torch.equal(hidden(ours, batches[0]), want)
    in_place(original)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))
    rk.unpatch(ours)
    assert not mapped(ours)
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))


def test_offloaded_weights_train():
    original, ours, batches = pair(offload=True)
    hidden(ours, batches[0])
    assert mapped(ours)
    fresh = patched(original)
    for model in (ours, fresh):
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
        model(**batches[0]).last_hidden_state.square().sum().backward()
        optimiser.step()
        model.eval()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True))
    assert torch.equal(hidden(ours, batches[0]), hidden(fresh, batches[0]))


def test_a_weight_that_is_a_part_of_something_stays_in_memory():
    _, ours, batches = pair(offload=True)
    dense = layers_of(ours)[0].output.dense
    whole = torch.stack([dense.weight.detach(), dense.weight.detach()])
    dense.weight.data = whole[0]
    hidden(ours, batches[0])
    assert len(mapped(ours)) == 3 * 6 - 1
    before = hidden(ours, batches[0])
    dense.weight.data.zero_()
    assert whole[0].abs().max() == 0
    assert not torch.equal(hidden(ours, batches[0]), before)


def test_weights_that_are_in_the_models_file_stay_there(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    build(case_of()).save_pretrained(tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    original, ours = (RobertaModel.from_pretrained(tmp_path / "model").eval() for _ in range(2))
    weight = layers_of(ours)[0].output.dense.weight
    if not any(start <= weight.data_ptr() < end for start, end in offloading._file_mappings()):
        pytest.skip("this transformers reads weights into memory")
    pointer = weight.data_ptr()
    rk.patch(ours, offload=True)
    batches = batches_for(case_of(), ours.config, 2)
    assert_promise(ours, original, batches)
    assert len(mapped(ours)) == 3 * 6
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert weight.data_ptr() == pointer
    for model in (ours, original):
        in_place(model)
    assert_promise(ours, original, batches)
    rk.unpatch(ours)
    assert weight.data_ptr() == pointer
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == content


def test_tied_layers():
    case = case_of()
    original = build(case)
    original.encoder.layer[2] = original.encoder.layer[0]
    ours = patched(original, quantization="int8")
    inputs = batch_for(case, original.config)
    hidden(ours, inputs)
    assert ours.encoder.layer[2] is ours.encoder.layer[0]
    assert len(set(map(id, mapped(ours)))) == 2 * 6
    want = hidden(patched(original, quantization="int8", offload=False), inputs)
    assert torch.equal(hidden(ours, inputs), want)


def test_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "is not there"))
    _, ours, batches = pair(quantization="int8")
    with logged("weights stay in memory"):
        got = hidden(ours, batches[0])
    assert not mapped(ours)
    with log() as messages:
        assert torch.equal(hidden(ours, batches[0]), got)
    assert messages == []


MEMORY = """
import os, sys, torch, transformers
import roberta_kernels as rk

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(lines["VmRSS"].split()[0]) / 1024

config = transformers.RobertaConfig(
    vocab_size=100, max_position_embeddings=66, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
    num_hidden_layers=6,
)
model = transformers.RobertaModel(config).eval()
if sys.argv[3]:
    model.save_pretrained(sys.argv[3])
    for file in os.scandir(sys.argv[3]):  # pages that wait to be written cannot leave memory
        with open(file, "rb") as opened:
            os.fsync(opened)
    del model
    model = transformers.RobertaModel.from_pretrained(sys.argv[3]).eval()
weights = 6 * 12 * 1024**2 * 4 / 2**20  # MB
ids = torch.arange(5, 25)[None]
warm = transformers.RobertaConfig(**config.to_dict() | {"num_hidden_layers": 1})
with torch.no_grad():
    small = transformers.RobertaModel(warm).eval()
    rk.patch(small, offload=True)
    small(ids)
    del small
    model(ids)
    before = resident()
    rk.patch(model, quantization=eval(sys.argv[1]), offload=eval(sys.argv[2]))
    model(ids)
    model(ids)
    inference = resident()
    rk.unpatch(model)
print((inference - before) / weights, (resident() - before) / weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "from_pretrained"])
@pytest.mark.parametrize(
    ("quantization", "offload", "grows"),
    [("int8", None, -0.75), ("bfloat16", None, -0.5), (None, True, 0.0), (None, False, 1.0), ("int8", False, 0.25)],
)
def test_resident_memory(quantization, offload, grows, loaded, tmp_path):
    """In units of the layers' weights: what inference adds to the process, and that unpatch takes it away again."""
    options = [repr(quantization), repr(offload), str(tmp_path / "model") if loaded else ""]
    out = subprocess.run([sys.executable, "-c", MEMORY, *options], check=True, capture_output=True, text=True).stdout
    inference, unpatched = map(float, out.split())
    assert abs(inference - grows) < 0.2, out
    assert unpatched < 0.2, out
    assert unpatched > -0.2 or (loaded and offload is not False), out
