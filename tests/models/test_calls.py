"""Every way to call a model: what can be asked for and passed in, hooks, adapters, weights that change."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import (
    Case,
    Ops,
    assert_case,
    assert_promise,
    batch_for,
    batches_for,
    broken_promises,
    build,
    exact_copy,
    in_dtype,
    patched,
    run,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}


def case_of(head="pooler", mask="right", seed=1, **kwargs):
    return Case(seed=seed, head=head, mask=mask, config=SMALL | kwargs.pop("config", {}), **kwargs)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def ours_original_batches(head="pooler", mask="right", **kwargs):
    case = case_of(head, mask, **kwargs)
    original = build(case)
    return patched(original), original, batches_for(case, original.config)


# --- outputs that can be asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["pooler", "masked_lm", "single_label", "choice", "causal_lm"])
@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_hidden_states(head, mask):
    ours, original, batches = ours_original_batches(head, mask)
    kwargs = {"output_hidden_states": True} | ({"use_cache": False} if head == "causal_lm" else {})
    with torch.no_grad():
        got, want = (model(**batches[0], **kwargs).hidden_states for model in (ours, original))
    assert len(got) == len(want) == SMALL["num_hidden_layers"] + 1
    assert [t.shape for t in got] == [t.shape for t in want]
    if head == "choice":
        batches = batches[:1]
        mask = batches[0].get("attention_mask")
        real = slice(None) if mask is None else mask.view(got[0].shape[:2]).bool()
        for a, b in zip(got, want, strict=True):
            close(a[real], b[real])
    else:
        assert_promise(ours, original, batches, head=head, **kwargs)
    assert ours(**batches[0]).hidden_states is None


def test_hidden_states_by_config():
    ours, original, batches = ours_original_batches()
    ours.config.output_hidden_states = original.config.output_hidden_states = True
    with torch.no_grad():
        got, want = ours(**batches[0]).hidden_states, original(**batches[0]).hidden_states
    assert len(got) == len(want) == 3
    assert ours(**batches[0], output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("family", ["roberta", "electra", "ernie", "xmod"])
@pytest.mark.parametrize("wanted", [2, -1, [0, 2], [1], [-2, 7]], ids=str)
def test_hidden_states_of_chosen_layers(wanted, family):
    # transformers 5.23 takes layer numbers, and records those only; before, whatever is true means all.
    ours, original, batches = ours_original_batches(family=family)
    with torch.no_grad():
        got, want = (model(**batches[0], output_hidden_states=wanted) for model in (ours, original))
    assert len(got.hidden_states) == len(want.hidden_states)
    assert [t is None for t in got.hidden_states] == [t is None for t in want.hidden_states]
    real = batches[0]["attention_mask"].bool()
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        if b is not None:
            close(a[real], b[real])
    close(got.last_hidden_state[real], want.last_hidden_state[real])


def test_hidden_states_asked_for_before_patching():
    # transformers leaves its hooks in the modules from then on.
    _, original, batches = ours_original_batches()
    original(**batches[0], output_hidden_states=True)
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches, exact=exact_copy(original), output_hidden_states=True)
    assert set(report.padded()) == {"output_hidden_states=True"}
    assert_promise(ours, original, batches)
    assert set(report.padded()) == {"output_hidden_states=True"}, "recording hooks must not cost the packed pass"


@pytest.mark.parametrize("head", ["pooler", "token"])
def test_attentions(head):
    ours, original, batches = ours_original_batches(head, attention="eager")
    with torch.no_grad():
        for inputs in batches:
            got = ours(**inputs, output_attentions=True, output_hidden_states=True)
            want = original(**inputs, output_attentions=True, output_hidden_states=True)
            assert len(got.attentions) == len(want.attentions) == 2
            for a, b in zip(got.attentions + got.hidden_states, want.attentions + want.hidden_states, strict=True):
                close(a, b)
    # What runs beside the attention is fused still, and rounds in its own way: the promise is the same.
    assert_promise(ours, original, batches, head=head, output_attentions=True)


@pytest.mark.parametrize("head", ["pooler", "masked_lm", "single_label", "span"])
def test_tuples(head):
    ours, original, batches = ours_original_batches(head)
    for kwargs in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
        with torch.no_grad():
            got, want = ours(**batches[0], **kwargs), original(**batches[0], **kwargs)
        assert type(got) is type(want) is tuple
        assert len(got) == len(want)
        assert [isinstance(part, tuple) for part in got] == [isinstance(part, tuple) for part in want]
    ours.config.return_dict = original.config.return_dict = False
    with torch.no_grad():
        assert len(ours(**batches[0])) == len(original(**batches[0]))
        assert isinstance(ours(**batches[0]), tuple)


# --- what can be passed in ------------------------------------------------------------------------------------------


def test_positional_arguments():
    ours, original, batches = ours_original_batches(config={"type_vocab_size": 2})
    inputs = batches[0]
    types = torch.randint(0, 2, inputs["input_ids"].shape)
    with torch.no_grad():
        want = original(inputs["input_ids"], inputs["attention_mask"], types)
        got = ours(inputs["input_ids"], inputs["attention_mask"], types)
        real = inputs["attention_mask"].bool()
        close(got[0][real], want[0][real])
    choice_ours, choice, (inputs, *_) = ours_original_batches("choice", config={"type_vocab_size": 2})
    types = torch.randint(0, 2, inputs["input_ids"].shape)
    with torch.no_grad():  # this class takes token_type_ids before the mask
        close(
            choice_ours(inputs["input_ids"], types, inputs["attention_mask"]).logits,
            choice(inputs["input_ids"], types, inputs["attention_mask"]).logits,
        )


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
def test_inputs_embeds(mask):
    ours, original, batches = ours_original_batches(mask=mask)
    for inputs in batches:
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = torch.randn(*ids.shape, SMALL["hidden_size"])
    assert_promise(ours, original, batches)


@pytest.mark.parametrize("family", ["roberta", "electra", "ernie"])
def test_inputs_embeds_of_the_ids_give_the_same_rows(family):
    ours, original, batches = ours_original_batches(mask="holes", family=family)
    report = rk.patch(ours)
    for inputs in batches:
        ids = inputs.pop("input_ids")
        inputs["position_ids"] = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            want = ours(input_ids=ids, **inputs)[0]
            got = ours(inputs_embeds=ours.get_input_embeddings()(ids), **inputs)[0]
            stock = original(input_ids=ids, **inputs)[0]
        close(got, want)
        close(got, stock)
    assert report.fallbacks() == {}


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("rows", [1, 4])
def test_position_ids(mask, rows):
    ours, original, batches = ours_original_batches(mask=mask)
    for inputs in batches:
        inputs["position_ids"] = torch.randint(0, 40, (rows, inputs["input_ids"].shape[1]))
    assert_promise(ours, original, batches)


@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_token_type_ids(mask):
    ours, original, batches = ours_original_batches(mask=mask, config={"type_vocab_size": 2})
    for inputs in batches:
        inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
    assert_promise(ours, original, batches)
    batches[0]["token_type_ids"] = torch.ones(1, batches[0]["input_ids"].shape[1], dtype=torch.int64)
    assert_promise(ours, original, batches[:1])


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_4d_masks(kind, attention):
    ours, original, batches = ours_original_batches("no_pooler", "none", attention=attention)
    if kind == "bool" and attention == "eager":
        pytest.skip("eager adds the mask to the scores")
    for inputs in batches:
        batch, length = inputs["input_ids"].shape
        visible = (torch.rand(batch, 1, length, length) < 0.6) | torch.eye(length).bool()
        inputs["attention_mask"] = visible if kind == "bool" else torch.where(visible, 0.0, -1e4)
    got, want = run(ours, batches[0]), run(original, batches[0])
    close(got["last_hidden_state"], want["last_hidden_state"])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.float32, torch.uint8])
def test_masks_of_every_dtype(kind):
    ours, original, (inputs, *_) = ours_original_batches()
    real = inputs["attention_mask"].bool()
    inputs["attention_mask"] = inputs["attention_mask"].to(kind)
    with torch.no_grad():
        close(ours(**inputs)[0][real], original(**inputs)[0][real])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_is_causal(causal, mask, how):
    ours, original, batches = ours_original_batches("no_pooler", mask)
    if how == "argument":
        assert_promise(ours, original, batches, is_causal=causal)
        return
    exact = exact_copy(original)
    for model in (ours, original, exact):
        model.config.is_causal = causal
    assert_promise(ours, original, batches, exact=exact)


def test_a_position_bias():
    ours, original, batches = ours_original_batches("no_pooler", "none")
    length = batches[0]["input_ids"].shape[1]
    bias = torch.randn(1, 2, length, length)
    with torch.no_grad():
        close(ours(**batches[0], position_bias=bias)[0], original(**batches[0], position_bias=bias)[0])


def test_arguments_without_meaning_here():
    ours, original, (inputs, *_) = ours_original_batches("masked_lm")
    extra = {"num_items_in_batch": torch.tensor(7), "encoder_hidden_states": torch.randn(4, 3, SMALL["hidden_size"])}
    with torch.no_grad():
        close(ours(**inputs, **extra).loss, original(**inputs, **extra).loss)


def test_attention_of_somebody_elses():
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    def halved(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2) * 0.5, None

    AttentionInterface.register("halved_for_this_test", halved)
    ALL_MASK_ATTENTION_FUNCTIONS.register("halved_for_this_test", sdpa_mask)
    _, original, batches = ours_original_batches()
    original.set_attn_implementation("halved_for_this_test")
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches)
    assert any("halved_for_this_test" in reason for reason in report.fallbacks())


@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_chunked_feed_forward(mask):
    ours, original, _ = ours_original_batches(mask=mask, config={"chunk_size_feed_forward": 4})
    case = case_of(mask=mask)
    batches = [batch_for(case, original.config, batch=size, length=12) for size in (2, 4, 5, 8)]
    report = rk.patch(ours)
    assert_promise(ours, original, batches, backward=True)
    assert report.padded() == {}


# --- hooks ----------------------------------------------------------------------------------------------------------

HOOKABLE = (
    "embeddings",
    "embeddings.word_embeddings",
    "embeddings.LayerNorm",
    "embeddings.dropout",
    "encoder",
    "encoder.layer.1",
    "encoder.layer.0.attention",
    "encoder.layer.0.attention.self",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.output",
    "encoder.layer.0.attention.output.dense",
    "encoder.layer.0.attention.output.dropout",
    "encoder.layer.0.attention.output.LayerNorm",
    "encoder.layer.1.intermediate",
    "encoder.layer.1.intermediate.dense",
    "encoder.layer.1.intermediate.intermediate_act_fn",
    "encoder.layer.1.output",
    "encoder.layer.1.output.dense",
    "encoder.layer.1.output.dropout",
    "encoder.layer.1.output.LayerNorm",
    "pooler",
)


def first_tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


@pytest.mark.parametrize("name", HOOKABLE)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_a_hook_sees_what_it_saw(name, kind):
    if (name, kind) == ("encoder", "backward"):
        pytest.skip("torch calls backward hooks for outputs that are tensors or tuples only")
    ours, original, batches = ours_original_batches(train=True)
    report = rk.patch(ours)
    seen = {}

    def watch(model, key):
        module = model.get_submodule(name)

        def note(tensor):  # returns None, so that nothing is changed
            seen[key] = None if tensor is None else tensor.detach()

        if kind == "forward":
            return module.register_forward_hook(lambda m, args, output: note(first_tensor(output)))
        if kind == "pre":
            return module.register_forward_pre_hook(lambda m, args: note(args[0] if args else None))
        return module.register_full_backward_hook(lambda m, grad_in, grad_out: note(grad_out[0]))

    inputs = batches[0]
    real = inputs["attention_mask"].bool()
    handles = [watch(ours, "ours"), watch(original, "original")]
    for model in (ours, original):
        output = model(**inputs)
        (output.last_hidden_state[real].sum() + output.pooler_output.sum()).backward()
    assert seen.keys() == {"ours", "original"}
    if seen["original"] is not None:
        assert seen["ours"].shape == seen["original"].shape
        rows = real if seen["original"].shape[:2] == real.shape else slice(None)
        close(seen["ours"][rows], seen["original"][rows])
    if name != "pooler":
        assert report.padded(), "packed rows are no business of a hook"
    for handle in handles:
        handle.remove()
    report = rk.patch(ours)
    assert_case(case_of(train=True), ours, original)
    assert report.padded() == {}
    assert report.fallbacks() == {}


@pytest.mark.parametrize("name", ["encoder.layer.0", "encoder.layer.1.output.dense", "embeddings", "encoder"])
def test_a_hook_that_changes_the_output(name):
    ours, original, batches = ours_original_batches()
    exact = exact_copy(original)

    def double(module, args, output):
        if isinstance(output, torch.Tensor):
            return output * 2
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    for model in (ours, original, exact):
        model.get_submodule(name).register_forward_hook(double)
    assert_promise(ours, original, batches, exact=exact)


def test_a_hook_on_every_module_sees_every_call():
    ours, original, batches = ours_original_batches()
    report = rk.patch(ours)
    calls = {}
    for key, model in (("ours", ours), ("original", original)):
        names = calls[key] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, names=names: names.append(type(module).__name__)
        )
        try:
            model(**batches[0])
        finally:
            handle.remove()
    assert calls["ours"] == calls["original"]
    assert report.fallbacks()


def test_a_forward_bound_to_the_instance():
    ours, original, batches = ours_original_batches()
    exact = exact_copy(original)
    for model in (ours, original, exact):
        dense = model.encoder.layer[0].intermediate.dense
        dense.forward = lambda x, dense=dense: nn.functional.linear(x, dense.weight * 2, dense.bias)
    assert_promise(ours, original, batches, exact=exact)


# --- weights and adapters that change after patching ----------------------------------------------------------------


class Adapted(nn.Linear):
    """A low-rank adapter, under the name of what it replaces."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(4, linear.in_features, generator=generator).to(linear.weight))
        self.up = nn.Parameter(torch.randn(linear.out_features, 4, generator=generator).to(linear.weight))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


Adapted.__name__ = "Linear"

LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.mark.parametrize("linear", LINEARS)
def test_an_adapter_put_in_after_patching(linear):
    ours, original, _ = ours_original_batches(train=True)
    for model in (ours, original):
        layer = model.encoder.layer[0]
        before = layer.get_submodule(linear)
        layer.set_submodule(linear, Adapted(before))
    assert_case(case_of(train=True), ours, original)


@pytest.mark.parametrize("linear", LINEARS)
def test_pruned_and_parametrised_weights(linear):
    _, original, batches = ours_original_batches()
    late = patched(original)
    for model in (original, late):
        prune.l1_unstructured(model.encoder.layer[0].get_submodule(linear), "weight", amount=0.4)
        parametrizations.weight_norm(model.encoder.layer[1].get_submodule(linear))
    # A pruned model has no float64 copy to compare with: its weight is no parameter, and cannot be copied.
    early = build(case_of())
    prune.l1_unstructured(early.encoder.layer[0].get_submodule(linear), "weight", amount=0.4)
    parametrizations.weight_norm(early.encoder.layer[1].get_submodule(linear))
    rk.patch(early)
    for inputs in batches:
        real = inputs["attention_mask"].bool()
        want = run(original, inputs)["last_hidden_state"][real]
        for ours in (late, early):
            close(run(ours, inputs)["last_hidden_state"][real], want)


def test_spectral_layer_norm_and_embedding_replacements():
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    for name, cls in (
        ("embeddings.LayerNorm", Doubled),
        ("encoder.layer.0.output.LayerNorm", Doubled),
        ("encoder.layer.0.attention.output.LayerNorm", Doubled),
        ("embeddings.word_embeddings", Shifted),
        ("embeddings.token_type_embeddings", Shifted),
    ):
        ours, original, batches = ours_original_batches()
        for model in (ours, original):
            model.get_submodule(name).__class__ = cls
        assert_promise(ours, original, batches)


def test_weights_changed_in_place():
    ours, original, batches = ours_original_batches("masked_lm")
    run(ours, batches[0])
    with torch.no_grad():
        for model in (ours, original):
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert_promise(ours, original, batches, head="masked_lm")
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in original.state_dict().items()}
    for model in (ours, original):
        model.load_state_dict(state)
    assert_promise(ours, original, batches, head="masked_lm")


def test_an_optimizer_step():
    ours, original, batches = ours_original_batches("masked_lm", train=True)
    for _ in range(2):
        for model in (ours, original):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            model(**batches[0]).loss.backward()
            optimizer.step()
            model.zero_grad()
    for (name, got), want in zip(ours.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_changed_after_patching(dtype):
    ours, original, batches = ours_original_batches()
    ours, original = ours.to(dtype), original.to(dtype)
    assert_promise(ours, original, batches)


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_on_a_cpu_runs_the_original(autocast):
    """Which is faster there than the reference; and the report says so."""
    original = build(Case(mask="left", config={"hidden_act": "gelu"}))
    original = original if autocast else original.half()
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    inputs = batch_for(Case(mask="left"), original.config)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast), Ops() as ops:
        got = ours(**inputs).last_hidden_state
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        want = original(**inputs).last_hidden_state
    assert any("float16 on a CPU" in reason for reason in report.fallbacks())
    ran = {name for name in ops.names if name.startswith("roberta_kernels") and "isa" not in name}
    if autocast:
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)  # norms are fused, in float32
        assert not any("attention" in name or "gelu" in name for name in ran)
    else:
        assert not ran
        assert torch.equal(got, want)


def test_layer_norms_kept_in_float32():
    # As PEFT does before training in low precision.
    ours, original, (inputs, *_) = ours_original_batches(dtype="bfloat16")
    for model in (ours, original):
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and "layer.0" in name:
                module.float()
    outcomes = []
    for model in (ours, original):
        try:
            with torch.no_grad():
                outcomes.append(model(**inputs).last_hidden_state)
        except RuntimeError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[1], str):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, rtol=0.1, atol=0.1)


def test_frozen_parameters():
    ours, original, _ = ours_original_batches("single_label", train=True)
    for wanted in (("bias", "classifier"), ("layer.1",), ("word_embeddings",)):
        for model in (ours, original):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(any(part in name for part in wanted))
        assert_case(case_of("single_label", train=True), ours, original)


def test_gradients_of_inputs_embeds():
    ours, original, (inputs, *_) = ours_original_batches("single_label")
    ids = inputs.pop("input_ids")
    embeds = torch.randn(*ids.shape, SMALL["hidden_size"])
    gradients = []
    for model in (ours, original):
        leaf = embeds.clone().requires_grad_()
        model(**inputs, inputs_embeds=leaf).loss.backward()
        gradients.append(leaf.grad)
    close(*gradients)


def test_resized_embeddings():
    ours, original, (inputs, *_) = ours_original_batches("masked_lm")
    for model in (ours, original):
        torch.manual_seed(0)
        model.resize_token_embeddings(150)
    inputs["input_ids"][0, 0] = 149
    with torch.no_grad():
        close(ours(**inputs).loss, original(**inputs).loss)


def test_inference_mode():
    ours, original, (inputs, *_) = ours_original_batches("single_label")
    with torch.inference_mode():
        close(ours(**inputs).logits, original(**inputs).logits)


def test_torch_func():
    ours, original, (inputs, *_) = ours_original_batches("single_label")
    gradients = []
    for model in (ours, original):
        parameters = dict(model.named_parameters())

        def loss(values, model=model):
            return torch.func.functional_call(model, values, kwargs=inputs).loss

        gradients.append(torch.func.grad(loss)(parameters))
    for name, want in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], want, rtol=1e-3, atol=1e-5, msg=name)


# What is mapped over: the batches, the weights of an ensemble, or single samples for a gradient each.
def mapped(what, model, inputs):
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def first_output(weights, inputs):
        return next(iter(torch.func.functional_call(model, (weights, buffers), kwargs=inputs).values()))

    if what == "batches":
        return torch.func.vmap(first_output, in_dims=(None, 0))(
            weights, {name: torch.stack([tensor, tensor.flip(0)]) for name, tensor in inputs.items()}
        )
    if what == "ensemble":
        ensemble = {name: torch.stack([tensor, tensor * 1.1]) for name, tensor in weights.items()}
        return torch.func.vmap(first_output, in_dims=(0, None))(ensemble, inputs)
    each = {name: tensor.unsqueeze(1) for name, tensor in inputs.items()}
    gradients = torch.func.vmap(torch.func.grad(lambda w, i: first_output(w, i).sum()), in_dims=(None, 0))
    return torch.cat([tensor.flatten() for tensor in gradients(weights, each).values()])


@pytest.mark.parametrize("what", ["batches", "ensemble", "gradients"])
@pytest.mark.parametrize("head", ["pooler", "token", "span"])
@pytest.mark.parametrize("family", ["roberta", "bert", "ernie", "xmod"])
def test_vmap(family, head, what):
    ours, original, (inputs, *_) = ours_original_batches(head, "none", family=family)
    report = rk.patch(ours)
    close(mapped(what, ours, inputs), mapped(what, original, inputs))
    assert any("inside a torch.func transform" in reason for reason in report.fallbacks())


@pytest.mark.parametrize("what", ["batches", "ensemble", "gradients"])
def test_vmap_with_a_mask(what):
    ours, original, (inputs, *_) = ours_original_batches("token")
    if what == "ensemble":
        close(mapped(what, ours, inputs), mapped(what, original, inputs))
        return
    for model in (original, ours):  # transformers itself reads the mask's values, which torch cannot map
        with pytest.raises(RuntimeError, match="vmap: It looks like you're"):
            mapped(what, model, inputs)


# --- mixed precision and generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["pooler", "masked_lm", "single_label"])
@pytest.mark.parametrize("mask", ["right", "left"])
def test_autocast(head, mask):
    ours, original, batches = ours_original_batches(head, mask, train=True)
    exact = exact_copy(original)
    draws = []
    for inputs in batches:
        results = []
        for model in (ours, original):
            with torch.autocast("cpu", torch.bfloat16):
                results.append(run(model, inputs, backward=True))
        results.append(run(exact, in_dtype(inputs, torch.float64), backward=True))
        assert {name: t.dtype for name, t in results[0].items()} == {name: t.dtype for name, t in results[1].items()}
        draws.append((*results, inputs["attention_mask"]))
    assert not (broken := broken_promises(draws, dtype=torch.bfloat16, head=head)), "\n".join(broken)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_greedy_generation_is_the_same_token_for_token(use_cache, mask):
    ours, original, (inputs, *_) = ours_original_batches("causal_lm", mask)
    inputs = {name: t for name, t in inputs.items() if name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    got, want = (model.generate(**inputs, **options) for model in (ours, original))
    assert torch.equal(got, want)


def test_a_cache_gives_what_no_cache_gives():
    ours, original, (inputs, *_) = ours_original_batches("causal_lm", "none")
    ids = inputs["input_ids"]
    with torch.no_grad():
        first = ours(ids[:, :-1], use_cache=True)
        second = ours(ids[:, -1:], past_key_values=first.past_key_values)
        close(second.logits[:, 0], original(ids, use_cache=False).logits[:, -1])


@pytest.mark.parametrize("add", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_that_came_between_inferences_is_seen_by_the_next_call_with_gradients(add):
    """Calls without gradients do not look for such hooks, which nothing calls then."""
    ours, original, batches = ours_original_batches(train=True)
    rk.patch(ours)
    seen = {}
    for model, key in ((ours, "ours"), (original, "original")):
        with torch.no_grad():
            model(**batches[0])
        module = model.get_submodule("encoder.layer.1.output.dropout")
        getattr(module, add)(lambda m, grads, *_, key=key: seen.__setitem__(key, grads[0].detach()))
        with torch.no_grad():
            model(**batches[0])
        assert key not in seen
        model(**batches[0]).pooler_output.sum().backward()
    assert seen.keys() == {"ours", "original"}
