"""`CrossEncoder.rank`: a question against a hundred passages of real lengths; as it comes, patched, on other engines.

The passages are docstrings of Python's standard library, spread evenly over it, the questions first lines of some of
them. The reranker has roberta-base's size and random weights: what is timed does not depend on them. A call ranks all
passages for one question, tokenizing included, in sentence-transformers' own batches of 32; questions take turns, the
same for everybody. Before anything is timed, the scores (before the sigmoid) of a question are compared with float64:
ours must keep the promise (docs/design.md, section 6), a peer must not be nonsense.

Peers: the same CrossEncoder as it comes; sentence-transformers' backends for ONNX Runtime and OpenVINO, each in a
process of .venv-optimum, which has the versions that optimum goes with (`make bench-rerank` makes it); and the same two
engines without optimum, on the export of benchmarks.engines, with the head in torch. What is not installed is named in
the result.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import machine, timing
from benchmarks.backend_process import BACKENDS, BackendProcess
from benchmarks.engines import ENGINES, INPUTS, Engine
from benchmarks.models import FLOOR_ULPS, model_config, original
from benchmarks.results_file import finish
from benchmarks.runner import first_line, percentile, relative_error
from benchmarks.timing import Call, Clock
from roberta_kernels import patch, tolerance
from roberta_kernels.demo.corpus import docstrings, train_tokenizer

PASSAGES, QUESTIONS, VOCABULARY = 100, 4, 8000
SMOKE_PASSAGES, SMOKE_VOCABULARY = 12, 300
OURS, STOCK = "ours", "sentence-transformers"
_NONSENSE = 0.1  # of the largest distance from the mean score
_EFFORT = timing.Effort(turns=9, min_turns=4, turn_seconds=0.1, max_calls=20, rest=0.15, budget=120.0)


def texts(*, smoke: bool) -> tuple[list[str], list[str]]:
    """Questions and passages."""
    found = docstrings(10 * SMOKE_PASSAGES if smoke else None)
    count = SMOKE_PASSAGES if smoke else PASSAGES
    passages = found[:: len(found) // count][:count]
    questions = [passage.splitlines()[0] for passage in passages[:: count // QUESTIONS]][:QUESTIONS]
    return questions, passages


def save_reranker(folder: Path, passages: list[str], *, smoke: bool) -> None:
    """A reranker's files, around the encoder of benchmarks.models, which the engines' export is of too."""
    from transformers import RobertaForSequenceClassification

    config = model_config(smoke=smoke, attention="sdpa")
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = RobertaForSequenceClassification(config)
        for parameter in model.classifier.parameters():  # its own start gives scores that hardly differ
            nn.init.normal_(parameter, std=0.1)
    model.roberta.load_state_dict(original("cpu", torch.float32, smoke=smoke, attention="sdpa").state_dict())
    model.save_pretrained(folder)
    save_tokenizer(folder, passages, config, smoke=smoke)
    # By the name that transformers 4, which the backends go with, has for it too.
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def save_tokenizer(folder: Path, passages: list[str], config: Any, *, smoke: bool) -> None:
    """A tokenizer's files, trained on the passages, for a model of that configuration."""
    tokenizer = train_tokenizer(passages, SMOKE_VOCABULARY if smoke else VOCABULARY)
    tokenizer.model_max_length = config.max_position_embeddings - 2
    tokenizer.save_pretrained(folder)


class _EngineEncoder(nn.Module):
    """An engine's session in the place of a reranker's encoder."""

    def __init__(self, session: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self._session = session

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        hidden = torch.from_numpy(
            self._session(dict(zip(INPUTS, (input_ids.numpy(), attention_mask.numpy()), strict=True)))
        )
        return _Output(hidden)


class _Output(SimpleNamespace):
    """What a head reads of an encoder's output: the hidden states, by index."""

    hidden_states = attentions = None

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def _stock(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu")


def _ours(folder: Path) -> Any:
    model = _stock(folder)
    report = patch(model)
    if not report:
        raise RuntimeError("patch replaced nothing")
    return model


def _engine(engine: Engine, exported: Path, threads: int, folder: Path) -> Any:
    model = _stock(folder)
    model.model.roberta = _EngineEncoder(engine.start(exported / engine.file, threads))
    return model


@dataclass(frozen=True)
class Reranker:
    """scores: of a question, `[passages]` before the sigmoid, which would squeeze differences. rank: what is timed.
    versions: of the packages that it runs on, where they are not this process's."""

    scores: Callable[[str], Tensor]
    rank: Callable[[str], Any]
    versions: dict[str, str] | None = None


def _here(make: Callable[[Path], Any], folder: Path, passages: list[str]) -> Reranker:
    """A CrossEncoder of this process."""
    model = make(folder / "model")
    return Reranker(
        lambda question: _scores(model, question, passages),
        lambda question: model.rank(question, passages, show_progress_bar=False),
    )


def _elsewhere(python: Path, backend: str, threads: int, folder: Path, _: list[str]) -> Reranker:
    """One in a process of another environment, which ends with this one."""
    process = BackendProcess(python, backend, folder / "model", folder / "passages.json", threads)
    return Reranker(process.scores, process.rank, process.versions)


def contenders(
    exported: Path, threads: int, python: Path
) -> tuple[dict[str, Callable[[Path, list[str]], Reranker]], dict[str, str]]:
    """How each is made of a folder with the reranker and the passages; and why others are missing.
    python: of the environment that has optimum."""
    known = {name: functools.partial(_here, make) for name, make in ((OURS, _ours), (STOCK, _stock))}
    missing = {}
    for backend in BACKENDS:
        label = f"{STOCK}, backend {backend}"
        if python.exists():
            known[label] = functools.partial(_elsewhere, python, backend, threads)
        else:
            missing[label] = f"there is no {python} (make bench-rerank makes it)"
    for name in ("ONNX Runtime", "OpenVINO"):
        engine = ENGINES[name]
        if engine.missing():
            missing[name] = engine.missing()
        else:
            known[name] = functools.partial(_here, functools.partial(_engine, engine, exported, threads))
    return known, missing


def _scores(model: Any, question: str, passages: list[str]) -> Tensor:
    pairs = [(question, passage) for passage in passages]
    return model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True, show_progress_bar=False)


def _check(name: str, scores: Tensor, stock: Tensor, exact: Tensor) -> dict[str, Any]:
    """The largest error against float64, of the largest distance from the mean score: random weights give scores that
    lie close together. Raises RuntimeError where the promise is broken, or a peer gives nonsense."""
    middle = exact.mean()
    row: dict[str, Any] = {"error": relative_error(scores.double() - middle, exact - middle), "within_promise": None}
    if name == OURS:
        found = tolerance.compare(scores, stock, exact, name="scores", floor_ulps=FLOOR_ULPS[torch.float32])
        row["within_promise"] = found.holds
        if not found.holds:
            raise RuntimeError(f"the promise is broken: {found}")
    elif not row["error"] < _NONSENSE:
        raise RuntimeError(f"wrong answers: relative error {row['error']:.1e}")
    return row


def measure(folder: Path, console: Console, python: Path, *, smoke: bool) -> dict[str, Any]:
    """The result file's content. folder: for what is written on the way. python: see contenders."""
    questions, passages = texts(smoke=smoke)
    save_reranker(folder / "model", passages, smoke=smoke)
    (folder / "passages.json").write_text(json.dumps(passages))
    command = [sys.executable, "-m", "benchmarks.engines", str(folder), *(["--smoke"] if smoke else [])]
    exported = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    known, missing = contenders(folder, torch.get_num_threads(), python)
    if exported.returncode != 0:
        why = f"the export failed: {(exported.stderr.strip().splitlines() or ['no reason'])[-1]}"
        for name in known.keys() & ENGINES.keys():
            del known[name]
            missing[name] = why
    stock = _stock(folder / "model")
    tokens = [
        len(row) for row in stock.tokenizer([[questions[0], text] for text in passages], truncation=True).input_ids
    ]
    reference = _scores(stock, questions[0], passages)
    exact = _scores(_stock(folder / "model").double(), questions[0], passages)
    results: dict[str, Any] = {
        "rerank": True,
        "quick": smoke,
        **machine.conditions("cpu", "sentence-transformers", "onnxruntime", "openvino"),
        "questions": len(questions),
        "tokens": tokens,
        "unavailable": missing,
        "failures": [],
        "contenders": [],
    }
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in known.items():
        console.print(f"checking {name}", markup=False, highlight=False)
        try:
            reranker = make(folder, passages)
            rows[name] = _check(name, reranker.scores(questions[0]), reference, exact)
            if reranker.versions:
                rows[name]["versions"] = reranker.versions
            calls[name] = _call(reranker, questions, slow=sum(map(len, passages)) > 20_000)
        except Exception as error:
            results["failures"].append({"contender": name, "reason": first_line(error), "broken": name == OURS})
    console.print("measuring", markup=False, highlight=False)
    samples = timing.measure(calls, Clock("cpu"), timing.QUICK if smoke else _EFFORT)
    for name, found in samples.items():
        seconds = statistics.median(found.calls)
        own = samples[OURS].turn_medians if OURS in samples else []
        ratios = [theirs / ours for theirs, ours in zip(found.turn_medians, own, strict=False)]
        results["contenders"].append(
            {
                "contender": name,
                **rows[name],
                "median_s": seconds,
                "p20_s": percentile(found.calls, 20),
                "p80_s": percentile(found.calls, 80),
                "calls": len(found.calls),
                "pairs_per_s": len(passages) / seconds,
                "tokens_per_s": sum(tokens) / seconds,
                # How many times as long as ours, turn by turn.
                "times_ours": [percentile(ratios, percent) for percent in (50, 20, 80)] if ratios else None,
            }
        )
    return results


def _call(reranker: Reranker, questions: list[str], *, slow: bool) -> Call:
    turn = itertools.cycle(questions)
    return Call(lambda: reranker.rank(next(turn)), contextlib.nullcontext, slow=slow)


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The results in words."""
    info, tokens = results["machine_info"], results["tokens"]
    lengths = f"of {min(tokens)} to {max(tokens)} tokens with their question (median {statistics.median(tokens):.0f})"
    yield f"CrossEncoder.rank, {len(tokens)} passages {lengths}, {info['cpu']}, {info['threads']} threads"
    for row in results["contenders"]:
        ratios = (
            "{:.2f} times as long as ours ({:.2f} to {:.2f})".format(*row["times_ours"]) if row["times_ours"] else ""
        )
        times = f"{row['median_s']:8.3f} s  {row['pairs_per_s']:8.1f} pairs/s"
        yield f"{row['contender']:<38} {times}  error {row['error']:.1e}  {ratios}"
        if "versions" in row:
            yield f"{'':<38} with {', '.join(f'{name} {version}' for name, version in row['versions'].items())}"
    for row in results["failures"]:
        yield f"{row['contender']}: {row['reason']}"
    for name, why in results["unavailable"].items():
        yield f"{name} is not measured: {why}"


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    """Writes rerank.json into folder. Exit status: 1 where ours failed."""
    if arguments.smoke:
        torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-rerank-") as work:
        results = measure(Path(work), console, arguments.optimum_python, smoke=arguments.smoke)
    finish(folder / "rerank.json", results, lines(results), console)
    return 1 if any(row["broken"] for row in results["failures"]) else 0
