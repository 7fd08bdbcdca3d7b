"""Whether a Hugging Face class is the code that the fused code stands in for: by its parts, and by running it.

Names and signatures prove nothing, and change without a change of meaning. So before the first module of a class is
replaced, a tiny one of the class is made and compared, in float64, with the same mathematics in plain torch:
milliseconds, once for each class. What else the fused code must know of the class (the classes of its parts, what a
model gives out, whether its mask can be replaced) is read from the same tiny module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from roberta_kernels.hf.families import family_of, part_class, role_of
from roberta_kernels.hf.formulas import (
    IDS,
    attention,
    dense,
    key_mask,
    numbers,
    output,
    padded_positions,
    same,
    zeros_at_padding,
)
from roberta_kernels.hf.known_heads import HeadFacts, run_head, run_masked_lm_head, run_splade_pooling
from roberta_kernels.hf.masks import BESIDE
from roberta_kernels.hf.structure import (
    AROUND,
    attention_parts,
    core_parts,
    feed_forward_parts,
    output_parts,
    replaced_code,
)


@dataclass(frozen=True)
class LayerFacts:
    """around: by half of a layer, the modules around its parts, which a fused one steps over: path and class."""

    around: tuple[tuple[tuple[str, type], ...], ...]


@dataclass(frozen=True)
class ModelFacts:
    """What a model of a class is made of, and what it does beside running its parts.

    output: what makes its output of last_hidden_state (and pooler_output, where `pooled`). unpadded: why its forward
    is not embeddings, layers and pooler, one after the other, or None. masks: why its layers cannot be handed
    something in place of the mask, or None. encoder_name: under which it has its layers. beside: whether what they are
    handed comes as an argument more, beside the mask.
    """

    embeddings: type
    encoder: type
    encoder_name: str
    layer: type
    attention: type
    output: type
    pooled: bool
    unpadded: str | None
    masks: str | None
    beside: bool


Facts = LayerFacts | ModelFacts | HeadFacts | None


class Verdict(NamedTuple):
    """difference: how the class differs from what is known, or None. lasting: whether it was found of transformers' own
    code, and not while a part of it was replaced by somebody else's."""

    facts: Facts
    difference: str | None
    lasting: bool


_known: dict[tuple[type, str], Verdict] = {}  # by class and role


def difference(cls: Any, role: str) -> str | None:
    """How a class of a role differs in what it computes from what the fused code stands in for, or None.

    torch's random state, default dtype, default device and fake tensors are neither used nor changed.
    """
    reason = replaced_code(cls)
    if reason is not None:
        return reason
    key = (cls, role)
    if role in _RUNS and not lasting(cls, role):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), unset_fake_temporarily():
                module = tiny(cls)
                facts, as_known = _RUNS[role](module)
        except Exception as error:
            # Not kept: a later call may come from where it can be run.
            return f"{cls.__name__} cannot be run as known: {type(error).__name__}: {error}"
        own = not any(replaced_code(type(part)) for part in module.modules())
        _known[key] = Verdict(facts, None if as_known else f"{cls.__name__} computes something else", own)
    return _known[key].difference if key in _known else None


def lasting(cls: type, role: str) -> bool:
    """Whether what is known of a class will not change; of a role that is not run, nothing is."""
    return role not in _RUNS or ((cls, role) in _known and _known[cls, role].lasting)


def layer_facts(cls: type, role: str) -> LayerFacts:
    """Of a class whose `difference` as a layer is None."""
    facts = _known[cls, role].facts
    assert isinstance(facts, LayerFacts)
    return facts


def head_facts(cls: type, role: str) -> HeadFacts | None:
    """Of a class with a head, whose `difference` is None; None of a kind of head that needs no look."""
    verdict = _known.get((cls, role))
    facts = None if verdict is None else verdict.facts
    assert facts is None or isinstance(facts, HeadFacts)
    return facts


def model_facts(cls: type, role: str) -> ModelFacts:
    """Of a class whose `difference` as a model is None."""
    facts = _known[cls, role].facts
    assert isinstance(facts, ModelFacts)
    return facts


def current_facts(model: Any) -> ModelFacts:
    """Of a model with a fast class: found anew where they were found while a part was somebody else's code."""
    original, role = type(model)._rk_original, type(model)._rk_role
    if not lasting(original, role) and difference(original, role) is not None:
        return model._rk_facts
    return model_facts(original, role)


def _config(cls: type) -> Any:
    """A tiny configuration of the class's family. Attributes that a family does not know do nothing."""
    config = part_class(cls, "Config")(
        hidden_size=16,
        embedding_size=12,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=12,
        vocab_size=20,
        max_position_embeddings=24,
        type_vocab_size=2,
        pad_token_id=1,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_dim=12,
        dropout=0.0,
        attention_dropout=0.0,
        pronunciation_vocab_size=20,
        pronunciation_embed_dim=12,
        shape_vocab_size=20,
        shape_embed_dim=12,
        default_language="en_XX",
    )
    config._attn_implementation = "eager"
    return config


_making: ContextVar[bool] = ContextVar("roberta_kernels_making_a_tiny_module", default=False)


def making() -> bool:
    """Whether a module is being made here to be looked at: nobody may patch that one."""
    return _making.get()


def tiny(cls: Any) -> Any:
    """A small module of a class, with weights that are made up; of a class without a configuration, as it is made."""
    token = _making.set(True)
    try:
        module = (cls() if family_of(cls) is None else cls(_config(cls))).to(torch.float64).eval()
    finally:
        _making.reset(token)
    for i, parameter in enumerate(module.parameters()):
        parameter.copy_(numbers(parameter.shape, i))
    return module


def _layer(role: str) -> Callable[[Any], tuple[LayerFacts, bool]]:
    def run(module: Any) -> tuple[LayerFacts, bool]:
        x, mask = numbers((2, 5, 16), 100), key_mask()
        first, second = attention_parts(module, role), feed_forward_parts(module, role)
        attended = output(first.output, attention(first.core, x, mask), x)
        want = output(second.output, F.gelu(dense(second.inner, attended)), attended)
        return LayerFacts(_around(module, role)), same(module(x, mask), want)

    return run


def _biased_layer(module: Any) -> tuple[LayerFacts, bool]:
    x, bias, role = numbers((2, 5, 16), 100), numbers((2, 2, 5, 5), 101), "mpnet_layer"
    mask = key_mask()
    first, second = attention_parts(module, role), feed_forward_parts(module, role)
    attended = output(first.output, attention(first.core, x, mask + bias), x)
    want = output(second.output, F.gelu(dense(second.inner, attended)), attended)
    got = module(x, mask, bias)
    return LayerFacts(_around(module, role)), isinstance(got, tuple) and len(got) == 1 and same(got[0], want)


def _around(module: Any, role: str) -> tuple[tuple[tuple[str, type], ...], ...]:
    return tuple(tuple((path, type(module.get_submodule(path))) for path in half) for half in AROUND[role])


def _self_attention(module: Any) -> tuple[None, bool]:
    x, mask = numbers((2, 5, 16), 100), key_mask()
    return None, same(module(x, mask)[0], attention(core_parts(module), x, mask))


def _self_output(module: Any) -> tuple[None, bool]:
    x, residual = numbers((2, 5, 16), 100), numbers((2, 5, 16), 101)
    return None, same(module(x, residual), output(output_parts(module), x, residual))


def _vocabulary(module: Any) -> tuple[None, bool]:
    x, norm = numbers((2, 5, 16), 100), module.layer_norm
    rows = F.layer_norm(F.gelu(dense(module.dense, x)), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return None, same(module(x), dense(module.decoder, rows))


def _embeddings(positions: Callable[[Tensor], Tensor], typed: bool = True) -> Callable[[Any], tuple[None, bool]]:
    def run(module: Any) -> tuple[None, bool]:
        ids = torch.tensor(IDS)
        types, own = (ids > 6).long(), torch.tensor([[3, 1, 2, 4, 7]])
        norm = module.LayerNorm

        def want(types: Tensor, positions: Tensor) -> Tensor:
            x = module.word_embeddings.weight[ids]
            x = x + module.token_type_embeddings.weight[types] if typed else x
            x = x + module.position_embeddings.weight[positions]
            return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

        plain = same(module(input_ids=ids), want(torch.zeros_like(ids), positions(ids)))
        given = module(input_ids=ids, position_ids=own, **({"token_type_ids": types} if typed else {}))
        return None, plain and same(given, want(types, own))

    return run


def _run_layers(module: Any, x: Tensor) -> Tensor:
    for layer in _encoder(module).layer:
        x = layer(x, key_mask())
    return x


def _run_biased_layers(module: Any, x: Tensor) -> Tensor:
    encoder, states = _encoder(module), [x]
    bias = encoder.compute_position_bias(x)
    if not torch.equal(bias, position_bias(encoder, x, x.shape[1]).expand_as(bias)):
        raise ValueError("the bias on the scores follows more than positions")
    for layer in encoder.layer:
        states.append(layer(states[-1], key_mask(), bias)[0])
    given = module(input_ids=torch.tensor(IDS), attention_mask=_real().long(), output_hidden_states=True)
    if not all(same(got, want) for got, want in zip(given.hidden_states, states, strict=True)):
        raise ValueError("other hidden states are given out")
    return states[-1]


def position_bias(encoder: Any, like: Tensor, length: int) -> Tensor:
    """`[heads, length, length]`: what the original adds to the scores of every layer, made by itself. It depends on
    positions alone, so one sequence's is everyone's. like: a tensor `[..., H]` of the hidden states' kind."""
    return encoder.compute_position_bias(like.new_empty(1, length, like.shape[-1]))[0]


def _real() -> Tensor:
    return torch.tensor(IDS) != 1


def _model(run_layers: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], tuple[ModelFacts, bool]]:
    def run(module: Any) -> tuple[ModelFacts, bool]:
        ids, real = torch.tensor(IDS), _real()
        mask = real.long()
        out = module(input_ids=ids, attention_mask=mask)
        pooled = "pooler_output" in inspect.signature(type(out)).parameters
        unpadded: str | None
        try:
            x = module.embeddings(input_ids=ids)
            project = module._modules.get("embeddings_project")
            x = run_layers(module, x if project is None else project(x))
            as_known = same(out.last_hidden_state[real], x[real])
            pooler = module._modules.get("pooler") if pooled else None
            if pooler is not None:
                as_known = as_known and same(out.pooler_output, pooler(x))
            more = [n for n in out if n not in ("last_hidden_state", "pooler_output") and out[n] is not None]
            unpadded = (
                None if as_known and not more else f"{type(module).__name__}.forward does more than run its parts"
            )
            if (
                unpadded is None
                and pooler is not None
                and not same(out.pooler_output, pooler(zeros_at_padding(x, real)))
            ):
                unpadded = f"{type(pooler).__name__} reads padded rows"
        except Exception as error:
            unpadded = f"the parts of {type(module).__name__} cannot be run as known: {type(error).__name__}: {error}"
        biased = run_layers is _run_biased_layers  # which the fused code runs itself, with masks of its own
        reach = unpadded if biased else _masks_reach(module, ids, mask, "")
        return _model_facts(module, out, pooled, unpadded, reach), True

    return run


def _encoder(module: Any) -> Any:
    family = family_of(type(module))
    assert family is not None
    return getattr(module, family.encoder)


def _attention_model(module: Any) -> tuple[ModelFacts, bool]:
    ids = torch.tensor(IDS)
    mask = (ids != 1).long()
    out = module(input_ids=ids, attention_mask=mask)
    reach = _masks_reach(module, ids, mask, "attention.self")
    return _model_facts(module, out, False, "only the attention of this family runs fused", reach), True


def _model_facts(module: Any, out: Any, pooled: bool, unpadded: str | None, masks: str | None) -> ModelFacts:
    encoder = _encoder(module)
    layer = encoder.layer[0]
    return ModelFacts(
        embeddings=type(module.embeddings),
        encoder=type(encoder),
        encoder_name=next(name for name, part in module.named_children() if part is encoder),
        layer=type(layer),
        attention=type(layer.attention),
        output=type(out),
        pooled=pooled,
        unpadded=unpadded,
        masks=masks,
        beside=_beside(layer),
    )


def _beside(layer: Any) -> bool:
    cls: Any = type(layer)
    return role_of(cls) == "distilbert_layer"


def _masks_reach(module: Any, ids: Tensor, mask: Tensor, where: str) -> str | None:
    """Why what a model's `_create_attention_masks` gives does not come to its layers (to their part `where`) as it is,
    or None: this is how the fused code hands them sequences in place of a mask. Or why what a model is given beside
    does not."""
    original: Any = getattr(module, "_create_attention_masks", None)
    name, layers = type(module).__name__, _encoder(module).layer
    beside = _beside(layers[0])
    if original is None and not beside:
        return f"{name} has no _create_attention_masks"
    given: list[bool] = []
    received: list[bool] = []
    replaced_mask = key_mask()

    def hand_over(*args: Any, **kwargs: Any) -> Any:
        given.append(any(value is mask for value in (*args, *kwargs.values())))
        return (replaced_mask, *original(*args, **kwargs)[1:])

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(any(value is replaced_mask for value in (*args, *kwargs.values())))

    parts = [layer.get_submodule(where) for layer in layers]
    handles = [part.register_forward_pre_hook(look, with_kwargs=True) for part in parts]
    try:
        if beside:
            module(input_ids=ids, attention_mask=mask, **{BESIDE: replaced_mask})
        else:
            module.__dict__["_create_attention_masks"] = hand_over
            module(input_ids=ids, attention_mask=mask)
    except Exception as error:
        return f"{name}._create_attention_masks is not as known: {type(error).__name__}: {error}"
    finally:
        module.__dict__.pop("_create_attention_masks", None)
        for handle in handles:
            handle.remove()
    if beside:
        return None if received == [True] * len(parts) else f"{name} does not hand its layers what it is given"
    if given != [True] or received != [True] * len(parts):
        return f"{name}._create_attention_masks does not make the layers' mask"
    return None


_RUNS: dict[str, Callable[[Any], tuple[Facts, bool]]] = {
    "layer": _layer("layer"),
    "distilbert_layer": _layer("distilbert_layer"),
    "mpnet_layer": _biased_layer,
    "self_attention": _self_attention,
    "self_output": _self_output,
    "vocabulary": _vocabulary,
    "embeddings": _embeddings(lambda ids: padded_positions(ids, 1)),
    "absolute_embeddings": _embeddings(lambda ids: torch.arange(ids.shape[1])[None]),
    "typeless_embeddings": _embeddings(lambda ids: padded_positions(ids, 1), typed=False),
    "typeless_absolute_embeddings": _embeddings(lambda ids: torch.arange(ids.shape[1])[None], typed=False),
    "model": _model(_run_layers),
    "biased_model": _model(_run_biased_layers),
    "attention_model": _attention_model,
    "head": run_head,
    "token_head": run_head,
    "masked_lm_head": run_masked_lm_head,
    "splade_pooling": run_splade_pooling,
}
