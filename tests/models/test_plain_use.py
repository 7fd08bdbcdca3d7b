"""The plainest use: a tokenizer, a sentence, a saved model; pipelines and Trainer around a patched one."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from model_cases import SENTENCE, SENTENCES, assert_promise, randomise, saved_model
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    pipeline,
)

import roberta_kernels as rk

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer as RoBERTa's, and a classifier, saved as from_pretrained expects them."""
    return saved_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_one_sentence_without_labels(folder, tokenizer):
    inputs = dict(tokenizer(SENTENCE, return_tensors="pt"))
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    assert inputs["input_ids"][0, -1] == tokenizer.eos_token_id
    assert inputs["input_ids"].shape[1] > 3
    original = RobertaForSequenceClassification.from_pretrained(folder)
    ours = rk.FastRobertaForSequenceClassification.from_pretrained(folder)
    assert_promise(ours, original, inputs)
    with torch.no_grad():
        got, want = ours(**inputs), original(**inputs)
    assert got.loss is None
    assert want.loss is None
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    assert got.logits.shape == (1, 3)


def test_one_sentence_with_a_label(folder, tokenizer):
    inputs = dict(tokenizer(SENTENCE, return_tensors="pt")) | {"labels": torch.tensor([2])}
    original = RobertaForSequenceClassification.from_pretrained(folder)
    ours = rk.FastRobertaForSequenceClassification.from_pretrained(folder)
    for model in (original, ours):
        model.train()
    # One sentence is one draw of the rounding errors: the sentence is joined by its own beginnings.
    batches = [
        {name: t if name == "labels" else t[:, :length] for name, t in inputs.items()}
        for length in range(3, inputs["input_ids"].shape[1] + 1)
    ]
    assert len(batches) > 4
    assert_promise(ours, original, batches, head="single_label", backward=True)
    assert ours(**inputs).loss.requires_grad


def test_sentences_of_many_lengths(folder, tokenizer):
    original = AutoModelForSequenceClassification.from_pretrained(folder)
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    for side in ("right", "left"):
        inputs = dict(tokenizer(list(SENTENCES), padding=True, padding_side=side, return_tensors="pt"))
        assert_promise(ours, original, inputs)
        if side == "right":  # with padding on the left the classifier reads padding, in the original as here
            with torch.no_grad():
                alone = torch.cat([ours(**tokenizer(s, return_tensors="pt")).logits for s in SENTENCES])
                torch.testing.assert_close(ours(**inputs).logits, alone, rtol=2e-4, atol=2e-5)
    assert report.fallbacks() == {}
    assert report.padded() == {}
    with torch.no_grad():
        want = original(**inputs).logits
        rk.unpatch(ours)
        assert torch.equal(ours(**inputs).logits, want)


def test_pipelines(folder, tokenizer):
    original = RobertaForSequenceClassification.from_pretrained(folder)
    ours = copy.deepcopy(original)
    rk.patch(ours)
    for batch_size in (1, 3):
        want, got = (
            pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)(
                list(SENTENCES), batch_size=batch_size
            )
            for model in (original, ours)
        )
        for row, expected in zip(got, want, strict=True):
            assert [label["label"] for label in row] == [label["label"] for label in expected]
            for a, b in zip(row, expected, strict=True):
                assert a["score"] == pytest.approx(b["score"], rel=1e-4)
    masked = RobertaForMaskedLM(original.config).eval()
    randomise(masked, 6)
    fast = rk.FastRobertaForMaskedLM(original.config).eval()
    fast.load_state_dict(masked.state_dict())
    texts = ["苹果是<mask>", "An apple is a <mask>, and a fruit is not."]
    want, got = (
        pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(texts, batch_size=2)
        for model in (masked, fast)
    )
    assert [[guess["token"] for guess in row] for row in got] == [[guess["token"] for guess in row] for row in want]


class Sentences(Dataset):
    def __init__(self, tokenizer):
        self.rows = [tokenizer(sentence) for sentence in SENTENCES]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index]) | {"labels": index % 3}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(folder, tokenizer, tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    original = RobertaForSequenceClassification.from_pretrained(folder)
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    losses = []
    for name, model in (("original", original), ("ours", ours)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=1,
            gradient_checkpointing=checkpointing,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Sentences(tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model(str(tmp_path / name))
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert report.fallbacks() == {}
    assert report.padded() == {}, "a right-padded batch is packed, with gradient checkpointing too"
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(again) is RobertaForSequenceClassification
    for (key, got), want in zip(again.state_dict().items(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3, msg=key)


class Tokens(Dataset):
    """Rows for a token head, of lengths that differ, with columns that no model takes."""

    def __len__(self):
        return 18

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        length = 3 + index % 7
        ids = torch.randint(6, 200, (length,), generator=draw).tolist()
        labels = torch.randint(-1, 3, (length,), generator=draw).tolist()  # one in four is left out of the loss
        return {
            "input_ids": ids,
            "labels": [-100 if label == -1 else label for label in labels],
            "text": "a column of its own",
            "length": length,
        }


@pytest.mark.parametrize("order", ["patched", "patched later", "FastRoberta"])
def test_trainer_counts_items_and_drops_columns(folder, tokenizer, tmp_path, order):
    # Steps of several batches: the loss is divided by the labels in all of them, which Trainer counts and hands to a
    # model whose forward takes **kwargs. And it drops the columns that are no parameters of forward.
    pytest.importorskip("accelerate")
    from transformers import DataCollatorForTokenClassification, RobertaForTokenClassification, Trainer
    from transformers import TrainingArguments as Arguments

    original = RobertaForTokenClassification(AutoConfig.from_pretrained(folder))
    randomise(original, 8)
    if order == "FastRoberta":
        ours = rk.FastRobertaForTokenClassification(original.config)
        ours.load_state_dict(original.state_dict())
    else:
        ours = copy.deepcopy(original)
    report = rk.patch(ours) if order != "patched later" else None
    losses, given = [], []
    for model in (original, ours):
        seen = []
        base = DataCollatorForTokenClassification(tokenizer)

        def collate(rows, base=base, seen=seen):
            seen.append(sorted(rows[0]))
            return base(rows)

        arguments = Arguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(), data_collator=collate)
        assert trainer.model_accepts_loss_kwargs
        if model is ours and order == "patched later":
            report = rk.patch(trainer.model)
        counted = []
        compute_loss = trainer.compute_loss

        def counting(model, inputs, *args, compute_loss=compute_loss, counted=counted, **kwargs):
            counted.append(int(kwargs["num_items_in_batch"]))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = counting
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        given.append((seen, counted))
    assert given[0] == given[1]
    seen, counted = given[1]
    assert all(columns == ["input_ids", "labels"] for columns in seen)
    assert len(counted) == 9
    assert len(set(counted)) == 3, "one count for each step"
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for (name, got), want in zip(ours.state_dict().items(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3, msg=name)
    assert report.fallbacks() == {}
    assert report.padded() == {}


def test_the_readme_s_first_snippet_runs_as_it_stands(folder, capsys):
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    lines = [f"path = {str(folder)!r}" if line.startswith("path = ") else line for line in snippet.splitlines()]
    assert sum(line.startswith("path = ") for line in lines) == 1
    exec(compile("\n".join(lines), "README.md", "exec"), {})
    told = capsys.readouterr().out
    assert "torch.Size([2, " in told
    assert "holds" in told
