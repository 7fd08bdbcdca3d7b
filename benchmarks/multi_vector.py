"""ColBERT on a CPU: documents to a vector for each token, and a question ranked by MaxSim; as it comes and patched.

The documents and questions are the passages and questions of benchmarks.rerank. The MultiVectorEncoder has
roberta-base's size and random weights, a projection to 128, ColBERT's list of punctuation that is not scored, and
queries of 32 tokens: what is missing is made of masks that no token sees and that are scored. What is timed does not
depend on the weights. "documents" encodes all documents, in sentence-transformers' own batches of 32 by length;
"query" encodes a question and ranks all documents, questions in turn. Tokenizing is in both.

Contenders, in turns: sentence-transformers as it comes, and patched; in float32 and as models in bfloat16. Before
anything is timed, vectors of the questions and of some documents are compared with float64 and with the same dtype as
it comes: ours must keep the promise (docs/design.md, section 6).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import statistics
import string
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import machine, timing
from benchmarks.models import FLOOR_ULPS, original
from benchmarks.rerank import save_tokenizer, texts
from benchmarks.results_file import finish
from benchmarks.runner import first_line, percentile, relative_error
from benchmarks.timing import Call, Clock
from roberta_kernels import patch, tolerance

WIDTH, QUERY_TOKENS = 128, 32
OURS, STOCK = "patched", "sentence-transformers"
_CHECKED = 12  # documents that are compared with float64
_EFFORT = timing.Effort(turns=9, min_turns=4, turn_seconds=0.1, max_calls=20, rest=0.15, budget=60.0)


def multi_vector_encoder(folder: Path, passages: list[str], *, smoke: bool) -> Any:
    """A MultiVectorEncoder around the encoder of benchmarks.models, whose files are left in folder."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize

    encoder = original("cpu", torch.float32, smoke=smoke, attention="sdpa")
    encoder.save_pretrained(folder)  # type: ignore[operator]
    save_tokenizer(folder, passages, encoder.config, smoke=smoke)
    expansion: Any = {"strategy": "fixed", "length": QUERY_TOKENS, "attend": False}
    hidden: int = encoder.config.hidden_size  # type: ignore[assignment,union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        projection = Dense(
            hidden, WIDTH, bias=False, activation_function=nn.Identity(), module_input_name="token_embeddings"
        )
    modules = [
        Transformer(str(folder), query_expansion=expansion, model_kwargs={"add_pooling_layer": False}),
        projection,
        MultiVectorMask(skiplist_words=list(string.punctuation)),
        Normalize(module_input_name="token_embeddings"),
    ]
    return MultiVectorEncoder(modules=modules, device="cpu")


def contenders(model: Any) -> dict[str, tuple[Any, Any]]:
    """By dtype, as the names of both end: as it comes, and patched. model: in float32."""
    found = {}
    for dtype, of in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
        stock = copy.deepcopy(model).to(dtype)
        ours = copy.deepcopy(stock)
        if not patch(ours):
            raise RuntimeError("patch replaced nothing")
        found[of] = (stock, ours)
    return found


def vectors(model: Any, questions: list[str], documents: list[str], batch: int = 32) -> list[Tensor]:
    """`[tokens, 128]` of each question, then of each document."""
    queries = model.encode_query(questions, batch_size=1, show_progress_bar=False)
    return queries + model.encode_document(documents, batch_size=batch, show_progress_bar=False)


def check(stock: Any, ours: Any, questions: list[str], documents: list[str]) -> dict[str, float]:
    """The largest error of both against float64, of vectors whose length is one: of the questions' and of some of the
    documents', which are encoded among all. Raises RuntimeError where ours breaks the promise."""
    some = range(0, len(documents), max(1, len(documents) // _CHECKED))
    double = copy.deepcopy(stock).double()
    exact = torch.cat(vectors(double, questions, [documents[row] for row in some], batch=1))
    rows = [*range(len(questions)), *(len(questions) + row for row in some)]
    found = [vectors(model, questions, documents) for model in (ours, stock)]
    both = [torch.cat([of_all[row] for row in rows]) for of_all in found]
    compared = tolerance.compare(*both, exact, name="vectors", floor_ulps=FLOOR_ULPS[both[0].dtype])
    if not compared.holds:
        raise RuntimeError(f"the promise is broken: {compared}")
    return dict(zip((OURS, STOCK), (relative_error(one, exact) for one in both), strict=True))


def _query(model: Any, questions: Iterator[str], documents: list[Tensor]) -> Tensor:
    return model.similarity(model.encode_query([next(questions)], show_progress_bar=False), documents).topk(10)[1]


def measure(folder: Path, console: Console, *, smoke: bool) -> dict[str, Any]:
    """The result file's content. folder: for the model's files."""
    questions, documents = texts(smoke=smoke)
    model = multi_vector_encoder(folder, documents, smoke=smoke)
    tokens = [len(row) for row in model.tokenizer(documents, truncation=True).input_ids]
    results: dict[str, Any] = {
        "multi_vector": True,
        "quick": smoke,
        **machine.conditions("cpu", "sentence-transformers"),
        "questions": len(questions),
        "query_tokens": QUERY_TOKENS,
        "tokens": tokens,
        "failures": [],
        "errors": {},
        "parts": {},
    }
    calls: dict[str, dict[str, Callable[[], Any]]] = {"documents": {}, "query": {}}
    for of, (stock, ours) in contenders(model).items():
        console.print(f"checking {OURS}{of}", markup=False, highlight=False)
        try:
            errors = check(stock, ours, questions, documents)
        except Exception as error:
            results["failures"].append({"contender": OURS + of, "reason": first_line(error)})
            continue
        for name, one in ((OURS, ours), (STOCK, stock)):
            results["errors"][name + of] = errors[name]
            encoded = one.encode_document(documents, show_progress_bar=False)
            calls["documents"][name + of] = functools.partial(one.encode_document, documents, show_progress_bar=False)
            calls["query"][name + of] = functools.partial(_query, one, itertools.cycle(questions), encoded)
    for part, runs in calls.items():
        console.print(f"measuring {part}", markup=False, highlight=False)
        slow = part == "documents" and not smoke
        turns = {name: Call(run, contextlib.nullcontext, slow=slow) for name, run in runs.items()}
        samples = timing.measure(turns, Clock("cpu"), timing.QUICK if smoke else _EFFORT)
        results["parts"][part] = {
            name: _figures(name, samples, tokens if part == "documents" else None) for name in samples
        }
    return results


def _figures(name: str, samples: dict[str, timing.Samples], tokens: list[int] | None) -> dict[str, Any]:
    """Of one contender. tokens: of each text that a call encodes, where there are rates of that."""
    found, stock = samples[name], samples[name.replace(OURS, STOCK)]
    seconds = statistics.median(found.calls)
    ratios = [theirs / ours for theirs, ours in zip(stock.turn_medians, found.turn_medians, strict=True)]
    row: dict[str, Any] = {
        "median_s": seconds,
        "p20_s": percentile(found.calls, 20),
        "p80_s": percentile(found.calls, 80),
        "calls": len(found.calls),
        # How many times as fast as the same dtype as it comes, turn by turn.
        "times_stock": [percentile(ratios, percent) for percent in (50, 20, 80)],
    }
    if tokens is not None:
        row |= {"documents_per_s": len(tokens) / seconds, "tokens_per_s": sum(tokens) / seconds}
    return row


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The results in words."""
    info, tokens = results["machine_info"], results["tokens"]
    lengths = f"of {min(tokens)} to {max(tokens)} tokens (median {statistics.median(tokens):.0f}, {sum(tokens)} in all)"
    yield f"MultiVectorEncoder, {len(tokens)} documents {lengths}, {info['cpu']}, {info['threads']} threads"
    for part, rows in results["parts"].items():
        for name, row in rows.items():
            rate = f"{row['tokens_per_s']:9.0f} tokens/s " if "tokens_per_s" in row else ""
            ratio = "{:.2f} times as fast ({:.2f} to {:.2f})".format(*row["times_stock"])
            error = f"error {results['errors'][name]:.1e}"
            yield f"{part:<9} {name:<31} {row['median_s']:8.3f} s  {rate} {error}  {ratio}"
    for row in results["failures"]:
        yield f"{row['contender']}: {row['reason']}"


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    """Writes multi_vector.json into folder. Exit status: 1 where ours failed."""
    if arguments.smoke:
        torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-multi-vector-") as work:
        results = measure(Path(work), console, smoke=arguments.smoke)
    finish(folder / "multi_vector.json", results, lines(results), console)
    return 1 if results["failures"] else 0
