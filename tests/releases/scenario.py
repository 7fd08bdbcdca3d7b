"""Run in a process of its own, with an invented release of transformers in front of sys.path: what stock models answer
there, then what patched ones do. Takes a JSON file of what to do, and writes a JSON file of what happened.

Every step is tried by itself, so that one run shows all that is wrong. It says what happened, and judges nothing but
whether two answers are the same: `test_invented_releases.py` says what must be.
"""

from __future__ import annotations

import collections
import copy
import json
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, LENGTH, HIDDEN, HEADS, LAYERS, VOCABULARY, LABELS = 4, 11, 32, 2, 2, 41, 3
LENGTHS = (11, 1, 6, 9)
CLASSES = ("RobertaModel", "RobertaForSequenceClassification", "RobertaForMaskedLM", "BertModel")
# Of float32, on models of two layers: rounding is some 1e-6 of the largest value, and another formula some 1e-2.
TOLERANCE = 1e-4


class FusedOps(TorchDispatchMode):
    """Counts the ops of ours that compute something for a model; not those that ask for or prepare something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("roberta_kernels") and any(part in name for part in ("_forward", "_backward", "encoder")):
            self.counts[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def build(name: str, attention: str = "sdpa") -> Any:
    """A model with weights in which every part matters: LayerNorms that scale, biases that are not zero."""
    cls = getattr(transformers, name)
    config = cls.config_class(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=48,
        type_vocab_size=2,
        max_position_embeddings=40,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
        attn_implementation=attention,
    )
    return randomise(cls(config)).eval()


def randomise(model: Any) -> Any:
    """Each parameter by its own name, so that one more changes no other."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(float("norm" in name.lower() and name.endswith("weight")) + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.7 if "embeddings" in name else parameter.shape[1] ** -0.5))
    return model


def mask_of(kind: str) -> Tensor:
    """int64 `[BATCH, LENGTH]`."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for row, real in enumerate(LENGTHS):
        mask[row, LENGTH - real if kind == "left" else 0 : LENGTH if kind == "left" else real] = 1
    return mask


def calls_of(name: str, job: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Each call of a model: what it is, its positional arguments, its others by the names of the installed release."""
    generator = torch.Generator().manual_seed(4)

    def numbers(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=generator)

    ids = numbers(VOCABULARY - 5, BATCH, LENGTH) + 5
    right, left = mask_of("right"), mask_of("left")
    on_right = {"input_ids": torch.where(right.bool(), ids, 1), "attention_mask": right}
    yield "no padding", (), {"input_ids": ids}
    yield "right padding", (), on_right
    yield "left padding", (), {"input_ids": torch.where(left.bool(), ids, 1), "attention_mask": left}
    yield "token types", (), on_right | {"token_type_ids": numbers(2, BATCH, LENGTH)}
    yield "position ids", (), on_right | {"position_ids": numbers(30, BATCH, LENGTH)}
    yield (
        "embeddings given",
        (),
        {
            "inputs_embeds": torch.randn(BATCH, LENGTH, HIDDEN, generator=generator),
            "attention_mask": right,
        },
    )
    yield "two by position", (on_right["input_ids"], right), {}
    yield "hidden states", (), on_right | {"output_hidden_states": True}
    visible = (torch.rand(BATCH, 1, LENGTH, LENGTH, generator=generator) < 0.6) | torch.eye(LENGTH).bool()
    yield "4D mask", (), {"input_ids": ids, "attention_mask": visible}
    for argument, (dtype, shape) in job["given"].items():
        generator = torch.Generator().manual_seed(5)
        value = numbers(3, *shape) if dtype == "int" else torch.rand(shape, generator=generator) + 0.5
        yield f"{argument} given", (), on_right | {argument: value}
        yield f"{argument} given, training", (), on_right | {argument: value}
    generator = torch.Generator().manual_seed(6)
    labels = {}
    if name.endswith("SequenceClassification"):
        labels = {"labels": numbers(LABELS, BATCH)}
    elif name.endswith("MaskedLM"):
        labels = {"labels": torch.where(right.bool(), numbers(VOCABULARY, BATCH, LENGTH), -100)}
    yield "training", (), on_right | labels
    yield "attention weights", (), on_right | {"output_attentions": True}


def answer(model: Any, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the output by name, of real positions where the output has one row per token; in training all
    gradients too."""
    mask = kwargs.get("attention_mask", args[1] if args else None)
    real = mask.bool() if mask is not None and mask.dim() == 2 else torch.ones(BATCH, LENGTH, dtype=torch.bool)
    kwargs = {names.get(name, name): value for name, value in kwargs.items()}
    training = what.endswith("training")
    model.train(training)
    model.set_attn_implementation("eager" if what == "attention weights" else model.rk_test_attention)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(training):
        output = model(*args, **kwargs)
    tensors: dict[str, Tensor] = {}
    for name, value in output.items():
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, Tensor):
                if name.endswith("attentions"):  # [batch, heads, queries, keys]
                    part = part.transpose(1, 2)
                tensors[f"{name}[{i}]"] = part[real] if part.shape[:2] == real.shape else part
    if training:
        loss = output["loss"] if output.get("loss") is not None else weighted_sum(tensors)
        loss.backward()
        tensors |= {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def weighted_sum(tensors: dict[str, Tensor]) -> Tensor:
    """A loss to which every value counts otherwise."""
    return sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors.values())  # type: ignore


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """What is not the same, in words."""
    if got.keys() != want.keys():
        return [f"gives {sorted(got.keys() - want.keys())} more, and {sorted(want.keys() - got.keys())} not"]
    found = []
    for name, tensor in want.items():
        if got[name].shape != tensor.shape or got[name].dtype != tensor.dtype:
            found.append(f"{name} is {got[name].dtype} {list(got[name].shape)}, not {tensor.dtype} {[*tensor.shape]}")
            continue
        # The gradients of the keys' biases are zero in exact arithmetic, and hold rounding of the size of the queries'.
        beside = want.get(name.replace("key.bias", "query.bias"), tensor)
        largest = max(float(tensor.abs().max()), float(beside.abs().max()), 1e-2)
        error = float((got[name] - tensor).abs().max())
        if not error <= TOLERANCE * largest:
            found.append(f"{name} is off by {error:.2g}, where the largest value is {largest:.2g}")
    return found


def tried(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, and what it raises: the error, where it came from last."""
    try:
        return action(), None
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        return None, f"{type(error).__name__}: {error} | " + " ".join(line.strip() for line in lines[-4:-1])


def stock_answers(name: str) -> dict[str, Any]:
    model = build(name)
    model.rk_test_attention = "sdpa"
    return {what: tried(lambda: answer(model, what, args, kwargs)) for what, args, kwargs in calls_of(name, job)}  # noqa: B023


def compare_calls(name: str, model: Any, stock: dict[str, Any], said: Callable[[], dict[str, int]]) -> dict[str, Any]:
    """Every call of a model against the stock one's answers."""
    happened = {}
    for what, args, kwargs in calls_of(name, job):
        before = said()
        with FusedOps() as ops:
            got, error = tried(lambda: answer(model, what, args, kwargs))  # noqa: B023
        after = said()
        happened[what] = {
            "error": error,
            "differences": [] if error else differences(got, stock[what][0]),
            "ops": dict(ops.counts),
            "said": [reason for reason, calls in after.items() if calls > before.get(reason, 0)],
        }
    return happened


def run_patched(rk: Any, name: str, stock: dict[str, Any]) -> dict[str, Any]:
    """A patched model; unpatched again; the same model made under patch_transformers; under the attention interface."""
    original = build(name)
    original.rk_test_attention = "sdpa"
    model = copy.deepcopy(original)
    report, error = tried(lambda: rk.patch(model))
    if error is not None:
        return {"problems": [f"patch: {error}"], "calls": {}, "left": []}
    calls = compare_calls(name, model, stock, lambda: report.fallbacks() | report.padded())
    problems = []
    what, args, kwargs = list(calls_of(name, job))[1]
    _, error = tried(lambda: rk.unpatch(model))
    if error is None:
        got, error = tried(lambda: answer(model, what, args, kwargs))
    if error is not None or any(not torch.equal(got[key], stock[what][0][key]) for key in stock[what][0]):
        problems.append(f"unpatched: {error or 'another answer than before'}")
    if [type(m) for m in model.modules()] != [type(m) for m in original.modules()]:
        problems.append("unpatched: other classes than before")

    def made_patched() -> list[str]:
        with rk.patch_transformers():
            model = build(name)
        model.rk_test_attention = "sdpa"
        return differences(answer(model, what, args, kwargs), stock[what][0])

    found, error = tried(made_patched)
    problems += [f"patch_transformers: {error}"] if error else [f"patch_transformers: {line}" for line in found]

    def by_the_interface() -> dict[str, Any]:
        model = build(name, "roberta_kernels")
        model.rk_test_attention = "roberta_kernels"
        return compare_calls(name, model, stock, rk.attention_interface.fallbacks)

    found, error = tried(by_the_interface)
    if error is not None:
        problems.append(f"attn_implementation='roberta_kernels': {error}")
    return {
        "problems": problems,
        "calls": calls,
        "interface": found or {},
        "left": [f"{left.name}: {left.reason}" for left in report.left],
        "replaced": len(report.replaced),
    }


def drop_in(rk: Any, stock: dict[str, Any]) -> str | list[str]:
    """What differs in FastRoberta's answer; or why there is none."""
    original = build("RobertaModel")
    what, args, kwargs = list(calls_of("RobertaModel", job))[1]

    def run() -> list[str]:
        model = rk.FastRoberta(original.config).eval()
        model.load_state_dict(original.state_dict())
        model.rk_test_attention = "sdpa"
        return differences(answer(model, what, args, kwargs), stock[what][0])

    found, error = tried(run)
    return error if error is not None else found


def verified(rk: Any) -> str | None:
    """What is wrong with `verify`'s report of a model, or why there is none."""
    _, _, inputs = list(calls_of("RobertaModel", job))[1]
    batch = {names.get(name, name): value for name, value in inputs.items()}
    report, error = tried(lambda: rk.verify(build("RobertaModel"), batch, gradients=True))
    return error if error is not None else None if report.holds else str(report)


def main() -> dict[str, Any]:
    happened: dict[str, Any] = {"transformers": transformers.__file__, "stock": {}, "stock_sums": {}, "models": {}}
    stock = {name: stock_answers(name) for name in CLASSES}
    for name, answers in stock.items():
        for what, (tensors, error) in answers.items():
            if error is not None:
                happened["stock"][f"{name}, {what}"] = error
            else:
                sums = [round(float(tensor.double().abs().sum()), 3) for tensor in tensors.values()]
                happened["stock_sums"][f"{name}, {what}"] = sorted(sums)
    rk, happened["import"] = tried(lambda: __import__("roberta_kernels"))
    if happened["stock"] or happened["import"]:
        return happened
    happened["models"] = {name: run_patched(rk, name, stock[name]) for name in CLASSES}
    happened["drop_in"] = drop_in(rk, stock["RobertaModel"])
    happened["verify"] = verified(rk)
    return happened


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # an overlay's folders are links to the installed ones
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        job = json.load(file)
    names: dict[str, str] = job["names"]  # of arguments: what this release calls them
    result = main()
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)
