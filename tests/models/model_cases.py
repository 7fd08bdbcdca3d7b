"""Models, batches and the three-way comparison that the model tests share.

A case is plain data, and everything in it (config, weights, batch) follows from its seed: what a failing test prints
is all that is needed to see the failure again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import roberta_kernels as rk
from roberta_kernels.hf.model import FastModel
from roberta_kernels.hf.survey import encoder_of
from roberta_kernels.tolerance import Comparison, compare


@contextlib.contextmanager
def log() -> Iterator[list[str]]:
    """What the package logs as warnings inside the block."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logger = logging.getLogger("roberta_kernels")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def logged(pattern: str) -> Iterator[None]:
    """The block logs a warning in which the pattern is found."""
    with log() as messages:
        yield
    assert any(re.search(pattern, message) for message in messages), messages


PREFIX = {
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "data2vec_text": "Data2VecText",
    "bert": "Bert",
    "electra": "Electra",
    "ernie": "Ernie",
    "bert_generation": "BertGeneration",
    "roc_bert": "RoCBert",
    "distilbert": "DistilBert",
    "roberta_prelayernorm": "RobertaPreLayerNorm",
    "xlm_roberta_xl": "XLMRobertaXL",
    "xmod": "Xmod",
}
# Families that have no other attention than eager.
EAGER_ONLY = {"mpnet": "MPNet"}
# What these families' configs need beside what all take.
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 24, "summary_last_dropout": 0.0},
    "ernie": {"use_task_id": True, "task_type_vocab_size": 3},
    "bert_generation": {"type_vocab_size": 1},
    "roc_bert": {
        **{"pronunciation_embed_dim": 12, "pronunciation_vocab_size": 97},
        **{"shape_embed_dim": 20, "shape_vocab_size": 97},
    },
    "distilbert": {"type_vocab_size": 1, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    "mpnet": {"type_vocab_size": 1, "attn_implementation": "eager"},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
}
# Other names of what all have.
RENAMED = {
    "distilbert": {
        **{"intermediate_size": "hidden_dim", "hidden_act": "activation"},
        **{"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"},
    },
}
OWN_NAMES = {
    ("bert", "causal_lm"): "BertLMHeadModel",
    ("bert_generation", "pooler"): "BertGenerationEncoder",
    ("bert_generation", "causal_lm"): "BertGenerationDecoder",
}
FAST = {
    "Model": "FastRoberta",
    **{
        name: f"FastRoberta{name}"
        for name in (
            "ForMaskedLM",
            "ForCausalLM",
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForQuestionAnswering",
            "ForMultipleChoice",
        )
    },
}
# Head -> class name without its prefix. The variants differ in the config, or in how the class is constructed.
HEADS = {
    "pooler": "Model",
    "no_pooler": "Model",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
    "regression": "ForSequenceClassification",
    "single_label": "ForSequenceClassification",
    "multi_label": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}
MASKS = ("none", "full", "right", "left", "holes", "real_ids")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Outputs with one row per token.
PER_TOKEN = {
    "last_hidden_state": HEADS.keys(),
    "logits": ("masked_lm", "causal_lm", "token"),
    "start_logits": ("span",),
    "end_logits": ("span",),
}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    family: str = "roberta"
    head: str = "pooler"
    dtype: str = "float32"
    mask: str = "right"
    train: bool = False
    attention: str = "sdpa"
    padded_rows: str = "exact"
    config: dict[str, Any] = field(default_factory=dict, compare=False)  # beats what the seed gives


def hf_class(family: str, head: str) -> type:
    return getattr(transformers, OWN_NAMES.get((family, head), (PREFIX | EAGER_ONLY)[family] + HEADS[head]))


def heads_of(family: str) -> list[str]:
    """The heads that a family has. A pooler can be left out where there is one."""
    if family == "bert_generation":
        return ["pooler", "causal_lm"]
    missing = {"electra": ("no_pooler",), "distilbert": ("no_pooler", "causal_lm"), "mpnet": ("causal_lm",)}.get(
        family, ()
    )
    return [head for head in HEADS if head not in missing]


def fast_class(family: str, head: str) -> type:
    name = HEADS[head]
    if family == "roberta":
        return getattr(rk, FAST[name])
    return getattr(rk.models, f"FastXLMRoberta{name}")


def config_for(case: Case) -> Any:
    """A small config, drawn from the seed."""
    draw = random.Random(case.seed)
    head_dim = draw.choice([16, 16, 24, 32, 64])
    heads = draw.choice([1, 2, 3])
    values = {
        "vocab_size": draw.choice([41, 64, 97]),
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "intermediate_size": draw.choice([37, 64, 96]),
        # relu's gradient jumps, so that a rounding of bfloat16 can be an error of the size of the value.
        "hidden_act": draw.choice(["gelu", "gelu", "gelu", "gelu_new", "relu" if case.dtype == "float32" else "gelu"]),
        "type_vocab_size": draw.choice([1, 2]),
        "pad_token_id": draw.choice([1, 1, 0, 5]),
        "layer_norm_eps": draw.choice([1e-5, 1e-12, 1e-3]),
        "max_position_embeddings": 48,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "num_labels": {"regression": 1, "span": 2}.get(case.head, 3),
        "is_decoder": case.head == "causal_lm",
        "attn_implementation": case.attention,
    }
    if case.head == "multi_label":
        values["problem_type"] = "multi_label_classification"
    own = FAMILY_CONFIG.get(case.family, {})
    names = RENAMED.get(case.family, {})
    values = {names.get(name, name): value for name, value in (values | own | case.config).items()}
    return hf_class(case.family, case.head).config_class(**values)


def randomise(model: nn.Module, seed: int) -> None:
    """Weights with which every part matters: LayerNorms that scale, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                is_scale = name.endswith(("LayerNorm.weight", "layer_norm.weight"))
                parameter.copy_(float(is_scale) + 0.2 * noise)
            else:
                embedding = "embeddings" in name
                parameter.copy_(noise * (0.7 if embedding else parameter.shape[1] ** -0.5))


def build(case: Case, cls: type | None = None) -> Any:
    """The Hugging Face model of a case (or `cls`, in its place), in the case's dtype."""
    cls = cls or hf_class(case.family, case.head)
    config = config_for(case)
    model = cls(config, add_pooling_layer=False) if case.head == "no_pooler" else cls(config)
    if case.head == "choice" and getattr(model.base_model, "pooler", True) is None:
        pytest.skip(f"transformers {transformers.__version__}: {cls.__name__} has no pooler, and cannot run")
    randomise(model, case.seed)
    return model.to(DTYPES[case.dtype]).train(case.train)


def masks_for(kind: str, batch: int, length: int, draw: random.Random) -> Tensor | None:
    """int64 `[batch, length]`. One sequence is whole, and one has a single real token."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    if kind == "full":
        return mask
    lengths = [length, 1, *(draw.randint(1, length) for _ in range(batch - 2))][:batch]
    draw.shuffle(lengths)
    for row, real in enumerate(lengths):
        if kind == "right":
            mask[row, real:] = 0
        elif kind == "left":
            mask[row, : length - real] = 0
        elif real < length:  # "holes", "real_ids": anywhere, but the first token stays
            mask[row, 1:] = torch.tensor([draw.random() < 0.5 for _ in range(length - 1)]).long()
    return mask


def batches_for(case: Case, config: Any, count: int = 4, first: int = 0) -> list[dict[str, Tensor]]:
    """Batches number `first` and on of a case."""
    numbers = range(first, first + count)
    return [batch_for(dataclasses.replace(case, seed=case.seed + 1000 * i), config) for i in numbers]


def batch_for(case: Case, config: Any, *, batch: int = 4, length: int | None = None) -> dict[str, Tensor]:
    """Inputs and labels of a case. Labels at padded positions are -100."""
    draw = random.Random(case.seed + 1)
    length = length or draw.choice([5, 7, 12, 17])
    rows = batch * 2 if case.head == "choice" else batch
    generator = torch.Generator().manual_seed(case.seed + 1)
    pad = config.pad_token_id
    ids = torch.randint(6, config.vocab_size, (rows, length), generator=generator)
    mask = masks_for(case.mask, rows, length, draw)
    if mask is not None and case.mask != "real_ids":
        ids = torch.where(mask.bool(), ids, pad)
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    if config.type_vocab_size == 2 and draw.random() < 0.7:
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
        if mask is not None and case.mask != "real_ids":  # as tokenizers give them
            inputs["token_type_ids"] *= mask
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if case.head == "choice":
        inputs = {name: tensor.view(batch, 2, length) for name, tensor in inputs.items()}
        inputs["labels"] = torch.randint(0, 2, (batch,), generator=generator)
    elif case.head in ("masked_lm", "causal_lm"):
        wanted = real & (torch.rand(ids.shape, generator=generator) < 0.6)
        wanted[:, :2] |= real[:, :2]
        labels = torch.where(wanted, torch.randint(0, config.vocab_size, ids.shape, generator=generator), -100)
        if case.head == "causal_lm":  # label i is compared with the logits of position i - 1, which must be real too
            labels[:, 1:][~real[:, :-1]] = -100
            labels[0, :2] = 7 if real[0, :2].all() else -100
        inputs["labels"] = labels
    elif case.head == "token":
        inputs["labels"] = torch.where(real, torch.randint(0, 3, ids.shape, generator=generator), -100)
    elif case.head == "span":
        inputs["start_positions"] = torch.randint(0, length, (batch,), generator=generator)
        inputs["end_positions"] = torch.randint(0, length, (batch,), generator=generator)
    elif case.head == "regression":
        # Far from any prediction: a difference of near values is all rounding.
        inputs["labels"] = 8 + torch.randn(batch, generator=generator)
    elif case.head == "single_label":
        inputs["labels"] = torch.randint(0, 3, (batch,), generator=generator)
    elif case.head == "multi_label":
        inputs["labels"] = torch.randint(0, 2, (batch, 3), generator=generator).float()
    return inputs


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0 else t
        for name, t in inputs.items()
    }


def exact_copy(model: Any) -> Any:
    """The model in float64, with a loss that stays there (transformers takes a causal one from float32 logits)."""
    exact = copy.deepcopy(model).double()

    def next_token_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        assert logits.dtype == torch.float64
        return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))

    for module in exact.modules():
        if type(module).__name__.endswith("ForCausalLM"):
            module.loss_function = next_token_loss
    return exact


def run(model: Any, inputs: dict[str, Any], *, backward: bool = False, **kwargs: Any) -> dict[str, Tensor]:
    """The tensors of the model's output by name; with `backward`, the gradients of its parameters too."""
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(backward):
        output = model(**inputs, **kwargs)
    tensors: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, tuple):
            tensors.update({f"{name}[{i}]": t for i, t in enumerate(value) if isinstance(t, Tensor)})
    if backward:
        objective(output, real_positions(inputs)).backward()
        tensors = {name: t.detach() for name, t in tensors.items()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                tensors[f"grad of {name}"] = parameter.grad
    return tensors


def real_positions(inputs: dict[str, Any]) -> Tensor | None:
    """The attention mask as `[..., length]`: of a 4D one, the positions that anyone sees."""
    mask = inputs.get("attention_mask")
    return mask if mask is None or mask.dim() < 4 else (mask[:, 0] > -1).any(1)


def objective(output: Any, mask: Tensor | None) -> Tensor:
    """The loss; for a bare model, a sum over what it gives at real positions."""
    if output.get("loss") is not None:
        return output["loss"]
    hidden = output["last_hidden_state"]
    hidden = hidden if mask is None else hidden[mask.bool()]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype, device=hidden.device)
    total = (hidden * weights.view(hidden.shape)).sum()
    pooled = output.get("pooler_output")
    return total if pooled is None else total + pooled.sum()


# Rounding floors of a whole model, in roundings of the largest value. A model is tens of ops deep; in bfloat16 four
# of them are 3% already.
FLOOR_ULPS = {torch.bfloat16: 4.0, torch.float16: 8.0, torch.float32: 16.0, torch.float64: 16.0}


def measured_together(name: str, head: str) -> tuple[str, ...]:
    """What a gradient is measured with. Some are zero in exact arithmetic, because a softmax does not see a constant
    added to all it is given: all they hold is rounding, which means something beside their neighbours only."""
    for query, key, value in (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("attn.q", "attn.k", "attn.v")):
        if name.endswith(f".{key}.bias"):
            return tuple(name.replace(f".{key}.", f".{part}.") for part in (query, key, value))
    constant = head == "span" or (head == "choice" and name == "grad of classifier.bias")
    if constant and name.endswith(".bias"):
        return (name, name.removesuffix("bias") + "weight")
    return (name,)


def broken_promises(
    draws: Sequence[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor | None]],
    *,
    dtype: torch.dtype,
    head: str = "pooler",
) -> list[str]:
    """Every tensor for which the numerical promise does not hold, and every one that only one side has.

    draws: (ours, the original's, exact, mask) for each batch. One batch of a small model is one draw of the rounding
    errors, the original's as ours, and two draws can lie far apart; so the errors of several batches, each in units of
    that batch's exact values, are measured as one.
    """
    names = [set(results) for draw in draws for results in draw[:3]]
    if any(keys != names[0] for keys in names):
        return [f"outputs differ: {[sorted(keys) for keys in names[:3]]}"]
    broken = []
    for name in draws[0][2]:
        gathered: tuple[list[Tensor], ...] = ([], [], [])
        dtypes = {results[name].dtype for draw in draws for results in draw[:2]}
        if len(dtypes) != 1:
            broken.append(f"{name} differs in dtype: {dtypes}")
            continue
        for *results, mask in draws:
            tensors = []
            for tensors_of in results:
                parts = [tensors_of[part].detach() for part in measured_together(name, head)]
                base = name.split("[", 1)[0]
                if mask is not None and (head in PER_TOKEN.get(base, ()) or base == "hidden_states"):
                    real = mask.bool().flatten(0, -2)  # of multiple choice: [batch, choices, length]
                    parts = [part[real] for part in parts]
                tensors.append(torch.cat([part.reshape(-1) for part in parts]).double())
            # What is all zero in this batch has no unit of its own.
            scale = max(rms(tensors[2]), 1e-6 * max(rms(t) for t in results[2].values()))
            for values, tensor in zip(gathered, tensors, strict=True):
                values.append(tensor / scale)
        ours, original, exact = (torch.cat(values) for values in gathered)
        measured = measure(ours, original, exact, dtype, name)
        if not measured.holds:
            broken.append(str(measured))
    return broken


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 1.0


def measure(ours: Tensor, original: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> Comparison:
    """tolerance.compare, for float64 tensors that hold errors of `dtype`."""
    ratio = torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    return compare(ours, original, exact, name=name, floor_ulps=FLOOR_ULPS[dtype] * ratio)


def assert_promise(
    ours: Any,
    original: Any,
    batches: dict[str, Any] | Sequence[dict[str, Any]],
    *,
    exact: Any = None,
    head: str = "pooler",
    backward: bool = False,
    everywhere: bool = False,
    what: Any = "",
    **kwargs: Any,
) -> None:
    """Runs three models on `batches` and compares all they give, at real positions or, with `everywhere`, at all."""
    exact = exact_copy(original) if exact is None else exact
    dtype = next(original.parameters()).dtype
    draws = []
    for inputs in [batches] if isinstance(batches, dict) else batches:
        low, high = in_dtype(inputs, dtype), in_dtype(inputs, torch.float64)
        results = [
            run(model, batch, backward=backward, **kwargs)
            for model, batch in ((ours, low), (original, low), (exact, high))
        ]
        draws.append((*results, None if everywhere else real_positions(inputs)))
    broken = broken_promises(draws, dtype=dtype, head=head)
    assert not broken, f"{what}\n" + "\n".join(broken)


def assert_case(
    case: Case,
    ours: Any,
    original: Any,
    *,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: inputs,
    **kwargs: Any,
) -> None:
    """assert_promise on the batches of a case, each as `change` makes it, forward and backward.

    What fails is tried once more, on more and other batches: a wrong answer is wrong there too, and two unlike draws of
    the same rounding errors are not.
    """
    if case.head == "causal_lm":
        kwargs.setdefault("use_cache", False)
    exact = exact_copy(original)

    def check(batches: list[dict[str, Tensor]]) -> None:
        batches = [change(inputs) for inputs in batches]
        assert_promise(ours, original, batches, exact=exact, head=case.head, backward=True, what=case, **kwargs)

    try:
        check(batches_for(case, original.config))
    except AssertionError:
        check(batches_for(case, original.config, count=16, first=4))


def patched(model: Any, *, layout: str = "unpadded", **options: Any) -> Any:
    """A copy of the model, patched. layout "padded": it computes every row, layer by layer."""
    copied = copy.deepcopy(model)
    rk.patch(copied, **options)
    return stay_padded(copied) if layout == "padded" else copied


def stay_padded(model: Any) -> Any:
    """A patched model whose encoders somebody looks at, so that it stays in the padded layout."""
    for module in model.modules():
        if isinstance(module, FastModel):
            encoder_of(module).register_forward_hook(_look)
    return model


def _look(module: Any, args: Any, output: Any) -> None:
    pass


class Ops(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def all_pairs(factors: dict[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Rows in which every pair of values of every two factors meets at least once."""
    draw = random.Random(seed)
    names = list(factors)
    open_pairs = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    while open_pairs:
        a, x, b, y = min(open_pairs, key=repr)
        candidates = []
        for _ in range(30):
            row = {name: draw.choice(list(factors[name])) for name in names}
            candidates.append(row | {a: x, b: y})
        best = max(candidates, key=lambda row: len(pairs(row) & open_pairs))
        open_pairs -= pairs(best)
        yield best


# --- text -----------------------------------------------------------------------------------------------------------

SENTENCE = "苹果是水果"
SENTENCES = (
    SENTENCE,
    "An apple is a fruit, and a fruit is not always an apple.",
    "水果不都是苹果",
    "Fruit flies like a banana.",
    "x",
    "Яблоко, pomme, τό μῆλον",
)


def byte_tokenizer() -> Any:
    """A byte-level BPE tokenizer as RoBERTa's, which knows SENTENCES well and all other texts as bytes."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        SENTENCES, vocab_size=270, min_frequency=1, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    bpe.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", bpe.token_to_id("</s>")), ("<s>", bpe.token_to_id("<s>"))
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=64,
    )


def saved_model(path: Any, cls: type = transformers.RobertaForSequenceClassification, **config: Any) -> Any:
    """A small RoBERTa with byte_tokenizer's vocabulary, both saved as from_pretrained expects them."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = cls(cls.config_class(**(values | config)))
    randomise(model, 5)
    model.save_pretrained(path)
    return path
