"""Real text: a corpus embedded by `roberta_kernels.encode`, against peers that sort it by length and pad.

The texts are docstrings of Python's standard library, spread evenly over it, mean-pooled. Tokenizing is in the times.
A peer takes the texts in order of length, in batches of at most 512 tokens with their padding. Of that there is little
then, some 6%, and not the half that batches of 32 texts would have in so small a corpus.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.models import SLOW, Prepared, Runner, announced, described, failure, figures, finish, make
from benchmarks.runner import first_line, relative_error
from benchmarks.timing import Call, Clock, Effort
from benchmarks.workloads import Batch
from roberta_kernels import encode
from roberta_kernels.demo.corpus import docstrings, train_tokenizer
from roberta_kernels.demo.corpus import encode as tokenize

CASE = "corpus"
TEXTS, VOCABULARY = 192, 8000
SMOKE_TEXTS, SMOKE_VOCABULARY = 12, 300
_PEER_TOKENS = 512
_CHECKED = 16  # texts whose embeddings are compared with float64, one at a time
_NONSENSE = 0.1


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def sorted_by_length(run: Callable[..., Any], tokenizer: Any, texts: list[str], longest: int) -> Tensor:
    """[texts, H]: what a peer does with a corpus. run: takes a padded batch."""
    ids = tokenize(tokenizer, texts, longest)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    found: list[Tensor] = []
    while len(found) < len(order):
        left = order[len(found) :]
        # Each next text is the longest of its batch.
        count = sum(len(ids[row]) * (place + 1) <= _PEER_TOKENS for place, row in enumerate(left))
        rows = [torch.tensor(ids[row]) for row in left[: max(1, count)]]
        batch = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        real = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        hidden = run(input_ids=batch, attention_mask=real.long()).last_hidden_state
        found.extend(_pooled(hidden, real))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.stack(found)[back]


def run_corpus(
    known: dict[str, Runner],
    prepared: dict[str, Prepared],
    *,
    config: Any,
    exact_model: nn.Module,
    roofs: dict[str, Any],
    effort: Effort,
    smoke: bool,
    begin: Callable[[str, str], None],
) -> Iterator[dict[str, Any]]:
    """Yields what run_models yields, for one case. exact_model: in float64."""
    texts = docstrings(SMOKE_TEXTS if smoke else None)
    tokenizer = train_tokenizer(texts, SMOKE_VOCABULARY if smoke else VOCABULARY)
    count = SMOKE_TEXTS if smoke else TEXTS
    texts = texts[:: len(texts) // count][:count]
    longest = config.max_position_embeddings - 2
    tokens = tokenize(tokenizer, texts, longest)
    batch = Batch(CASE, tuple(map(len, tokens)))
    case = described(CASE, "float32", "forward", batch, smoke=smoke)
    with torch.no_grad():
        exact = torch.stack(
            [exact_model(torch.tensor([row])).last_hidden_state[0].mean(0) for row in tokens[:_CHECKED]]
        )
    calls: dict[str, Call] = {}
    checked: dict[str, dict[str, Any]] = {}
    for name, runner in known.items():
        if runner.missing:
            continue
        begin(CASE, name)
        try:
            if name not in prepared:
                prepared[name] = make(runner, "cpu", torch.float32, smoke=smoke)
            call = _call(prepared[name][0], runner, tokenizer, texts, longest)
            began = time.perf_counter()
            error = relative_error(call()[:_CHECKED], exact)
            slow = time.perf_counter() - began > SLOW
        except Exception as found:
            yield failure(case, name, first_line(found), gap=not runner.ours)
            continue
        if not error < _NONSENSE:
            yield failure(case, name, f"wrong answers: relative error {error:.1e}", gap=not runner.ours)
            continue
        checked[name] = {"error": error, "within_promise": None}
        calls[name] = Call(call, functools.partial(announced, begin, CASE, name), slow)
    rows = {}
    for name, samples in timing.measure(calls, Clock("cpu"), effort).items():
        row = {**case, "contender": name, **checked[name]}
        rows[name] = row | figures(known[name], samples, batch, config, roofs, "forward", "float32")
        # The weights are read once for each batch, and how many there are is the contender's own affair.
        rows[name].pop("memory_fraction")
        rows[name].pop("bytes")
    yield from finish(rows)


def _call(
    run: Callable[..., Any], runner: Runner, tokenizer: Any, texts: list[str], longest: int
) -> Callable[[], Tensor]:
    def ours() -> Tensor:
        found = encode(run, tokenizer, texts, pooling="mean").embeddings  # type: ignore[arg-type]
        return torch.from_numpy(found)

    def peer() -> Tensor:
        with torch.no_grad():
            return sorted_by_length(run, tokenizer, texts, longest)

    return ours if runner.ours else peer
