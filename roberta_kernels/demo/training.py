"""A small RoBERTa learns to fill in masked words: original and patched from the same weights, on the same batches.

Rounding differs between the two, and training magnifies a difference at every step, so no fixed tolerance says how
close two right curves stay. A third run says it: the original once more, with its attention written out (eager) in
place of torch's fused one. That is the same mathematics summed in another order, and what it does to the curve is what
rounding does to it.
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from roberta_kernels.demo.corpus import encode
from roberta_kernels.demo.throughput import collate, synchronize
from roberta_kernels.patching import PatchReport, patch

BATCH, LONGEST, LEARNING_RATE, BETAS = 16, 96, 1e-3, (0.9, 0.98)
MASKED, KEPT, RANDOM = 0.15, 0.1, 0.1  # of the tokens; of the masked ones
FEWEST_STEPS, MOST_STEPS = 12, 10_000

# A curve may be this many times as far from the original's as the control's is at its farthest. Two right ways to sum
# drift by distances of the same order, not the same distance; a layer that is wrong by a percent drifts by orders of
# magnitude more. (What is wrong by less, verify finds.) The floor, ten roundings of the loss, is for a control that
# happens to round like the original.
DRIFT, DRIFT_FLOOR = 10.0, 5e-6


@dataclass
class Prediction:
    text: str
    truth: str
    guesses: list[tuple[str, float]]


@dataclass
class Training:
    losses: dict[str, list[float]]  # original, patched, control
    seconds: dict[str, float]  # of all steps
    held_out: dict[str, float]  # loss on docstrings that were not trained on
    frequencies: float  # the same of knowing only how frequent each token is: where learning from context begins
    predictions: list[Prediction]
    patch_report: PatchReport
    parameters: int
    padding: float

    @property
    def steps(self) -> int:
        return len(self.losses["original"])

    def drift(self, name: str) -> list[float]:
        return [abs(a - b) for a, b in zip(self.losses[name], self.losses["original"], strict=True)]

    @property
    def largest_difference(self) -> float:
        return max(self.drift("patched"))

    @property
    def allowed_difference(self) -> float:
        return DRIFT * max(self.drift("control")) + DRIFT_FLOOR

    @property
    def holds(self) -> bool:
        return self.largest_difference <= self.allowed_difference  # False for nan

    @property
    def speedup(self) -> float:
        return self.seconds["original"] / self.seconds["patched"]


class Student:
    """A model and its optimiser."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        from transformers import get_linear_schedule_with_warmup

        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.01)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, max(1, steps // 10), steps)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, batch: dict[str, Tensor]) -> None:
        synchronize(batch)
        start = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(batch)
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item())


def small_model(tokenizer: Any, *, seed: int, layers: int, hidden: int) -> Any:
    """Without dropout: original and patched draw different masks, and their curves could not be compared."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(seed)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            max_position_embeddings=LONGEST + 2,
            type_vocab_size=1,
            initializer_range=0.05,  # narrow layers learn sooner from wider weights
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )


def mask_tokens(batch: dict[str, Tensor], tokenizer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Dynamic masking (RoBERTa, section 4.1): of 15% of the tokens 80% masked, 10% another word, 10% as they are."""
    ids = batch["input_ids"].clone()
    can = batch["attention_mask"].bool()
    for special in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        can &= ids != special
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & can
    fate = torch.rand(ids.shape, generator=generator)
    words = torch.randint(len(tokenizer), ids.shape, generator=generator)
    labels = ids.masked_fill(~chosen, -100)
    ids = torch.where(chosen & (fate >= KEPT + RANDOM), tokenizer.mask_token_id, ids)
    ids = torch.where(chosen & (fate < RANDOM), words, ids)
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}


def batches(rows: list[list[int]], tokenizer: Any, count: int, seed: int) -> list[dict[str, Tensor]]:
    """`count` batches, shuffled anew and masked anew each time round."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    made = []
    for _ in range(count):
        while len(order) < BATCH:
            order += torch.randperm(len(rows), generator=generator).tolist()
        batch = collate([rows[i] for i in order[:BATCH]], tokenizer.pad_token_id, torch.device("cpu"))
        made.append(mask_tokens(batch, tokenizer, generator))
        del order[:BATCH]
    return made


def train(
    tokenizer: Any,
    texts: list[str],
    *,
    device: torch.device,
    seed: int,
    layers: int,
    hidden: int,
    budget: float,
    console: Console,
) -> Training:
    """Trains the three in turns, step by step, for about `budget` seconds in all. Every 20th docstring is held out."""
    rows = encode(tokenizer, texts, LONGEST)
    held_out = list(range(0, len(rows), 20))
    training_rows = [row for i, row in enumerate(rows) if i % 20]
    models: dict[str, Any] = {"original": small_model(tokenizer, seed=seed, layers=layers, hidden=hidden).to(device)}
    for name in ("patched", "control"):
        models[name] = copy.deepcopy(models["original"])
    report = patch(models["patched"])
    models["control"].set_attn_implementation("eager")

    rehearsal = [{k: v.to(device) for k, v in b.items()} for b in batches(training_rows, tokenizer, 4, seed + 1)]
    steps = _steps_in(budget, list(models.values()), rehearsal)
    students = {name: Student(model, steps) for name, model in models.items()}
    made = batches(training_rows, tokenizer, steps, seed)
    padding = 1 - sum(int(b["attention_mask"].sum()) for b in made) / sum(b["input_ids"].numel() for b in made)
    columns = ("{task.description}", BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        task = progress.add_task("training ", total=steps, loss="")
        for i, batch in enumerate(made):
            batch = {key: value.to(device) for key, value in batch.items()}
            names = list(students)
            for name in names[i % 3 :] + names[: i % 3]:
                students[name].step(batch)
            progress.update(task, advance=1, loss=f"loss {students['patched'].losses[-1]:.2f}")

    tests = batches([rows[i] for i in held_out], tokenizer, max(1, min(8, len(held_out) // BATCH)), seed + 2)
    return Training(
        losses={name: student.losses for name, student in students.items()},
        seconds={name: student.seconds for name, student in students.items()},
        held_out={name: _loss(models[name], tests, device) for name in ("original", "patched")},
        frequencies=_loss_of_frequencies(training_rows, tests, len(tokenizer)),
        predictions=_predictions(models["patched"], tokenizer, [texts[i] for i in held_out], device),
        patch_report=report,
        parameters=sum(p.numel() for p in models["original"].parameters()),
        padding=padding,
    )


def _steps_in(budget: float, models: list[Any], rehearsal: list[dict[str, Tensor]]) -> int:
    """How many steps of all models there is time for: a rehearsal on copies tells. The fastest step of each counts: the
    others were disturbed."""
    seconds = 0.0
    for model in models:
        student = Student(copy.deepcopy(model), 10)
        marks = [0.0]
        for batch in rehearsal:
            student.step(batch)
            marks.append(student.seconds)
        seconds += min(after - before for before, after in itertools.pairwise(marks))
    return int(min(MOST_STEPS, max(FEWEST_STEPS, budget / seconds)))


@torch.no_grad()
def _loss(model: Any, tests: list[dict[str, Tensor]], device: torch.device) -> float:
    """Mean loss over all masked words."""
    model.eval()
    total, count = 0.0, 0
    for batch in tests:
        words = int((batch["labels"] != -100).sum())
        total += float(model(**{key: value.to(device) for key, value in batch.items()}).loss) * words
        count += words
    return total / count


def _loss_of_frequencies(rows: list[list[int]], tests: list[dict[str, Tensor]], vocabulary: int) -> float:
    counts = torch.bincount(torch.tensor([token for row in rows for token in row[1:-1]]), minlength=vocabulary) + 1
    targets = torch.cat([batch["labels"][batch["labels"] != -100] for batch in tests])
    return float(-(counts / counts.sum()).log()[targets].mean())


@torch.no_grad()
def _predictions(
    model: Any, tokenizer: Any, texts: list[str], device: torch.device, count: int = 6
) -> list[Prediction]:
    """Hides the middle word of the first held-out docstrings that are one line of 6 to 16 words, and guesses it."""
    model.eval()
    found: list[Prediction] = []
    for text in texts:
        words = text.split(" ")
        middle = len(words) // 2
        if "\n" in text or not 6 <= len(words) <= 16 or not words[middle].isalpha():
            continue
        if len(tokenizer(" " + words[middle], add_special_tokens=False)["input_ids"]) != 1:
            continue
        question = " ".join([*words[:middle], tokenizer.mask_token, *words[middle + 1 :]])
        batch = tokenizer(question, return_tensors="pt", truncation=True, max_length=LONGEST).to(device)
        place = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()
        if len(place) != 1:
            continue
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chances, ids = logits[0, place[0, 0]].float().softmax(-1).topk(5)
        guesses = [
            (tokenizer.decode([i]).strip() or "(space)", p) for i, p in zip(ids.tolist(), chances.tolist(), strict=True)
        ]
        found.append(Prediction(question, words[middle], guesses))
        if len(found) == count:
            break
    return found
