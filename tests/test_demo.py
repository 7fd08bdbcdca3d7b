"""The demo: its text, its masking, and one quick run from end to end."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from roberta_kernels import encoder_call, ops, tolerance
from roberta_kernels.cli.commands import app
from roberta_kernels.demo import corpus, pictures, stages, throughput, training


@pytest.fixture(scope="module")
def texts():
    return corpus.docstrings(400)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return corpus.train_tokenizer(texts, 1000)


def test_the_text_is_real_and_in_a_fixed_order(texts):
    assert texts == corpus.docstrings(400)
    assert len(texts) == len(set(texts)) == 400
    assert all(text and text == text.strip() for text in texts)
    lengths = [len(text) for text in texts]
    assert min(lengths) < 20
    assert max(lengths) > 1000


def test_the_tokenizer_is_laid_out_as_robertas(tokenizer, texts):
    assert tokenizer.convert_tokens_to_ids(list(corpus.SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    ids = tokenizer("a <mask> word")["input_ids"]
    assert ids[0] == 0
    assert ids[-1] == 2
    assert 4 in ids
    for text in texts[:50]:
        assert tokenizer.decode(tokenizer(text)["input_ids"][1:-1], clean_up_tokenization_spaces=False) == text
    assert max(map(len, corpus.encode(tokenizer, [" ".join(texts)]))) == corpus.LONGEST


def test_masking_is_dynamic_and_leaves_padding_alone(tokenizer):
    rows = [[0, *range(10, 90), 2], [0, 20, 21, 2]]
    batch = throughput.collate(rows, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    chosen = masked = kept = 0
    seen = set()
    for _ in range(200):
        made = training.mask_tokens(batch, tokenizer, generator)
        at = made["labels"] != -100
        seen.add(tuple(at.flatten().tolist()))
        assert not bool(at[1, 4:].any())
        assert not bool(at[:, 0].any())
        assert torch.equal(made["labels"][at], batch["input_ids"][at])
        assert torch.equal(made["input_ids"][~at], batch["input_ids"][~at])
        chosen += int(at.sum())
        masked += int((made["input_ids"][at] == 4).sum())
        kept += int((made["input_ids"][at] == batch["input_ids"][at]).sum())
    assert len(seen) > 190
    assert chosen / (200 * 82) == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1, abs=0.03)


def test_batches_are_the_same_from_the_same_seed(tokenizer):
    rows = [[0, 10 + i, 11, 12, 2] for i in range(40)]
    one, same = (training.batches(rows, tokenizer, 6, seed=3) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(one, same, strict=True) for key in a)
    other = training.batches(rows, tokenizer, 6, seed=4)
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))


def test_every_beginning_of_the_order_is_spread_evenly():
    assert sorted(throughput.spread(457)) == list(range(457))
    assert throughput.spread(1) == [0]
    for count in (4, 10, 40):
        some = sorted(throughput.spread(457)[:count])
        gaps = [b - a for a, b in itertools.pairwise(some)]
        assert max(gaps) < 3 * 457 / count


def test_smoothing_starts_at_the_first_value():
    assert pictures.smooth([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])


@pytest.mark.full
def test_quick_demo_from_end_to_end(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--quick", "--output", str(tmp_path / "new" / "folder")])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "new" / "folder" / "summary.json").read_text())
    assert summary["holds"] is True
    for picture in ("throughput.png", "loss.png"):
        data = (tmp_path / "new" / "folder" / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    embedding, trained = summary["embedding"], summary["training"]
    assert len(embedding["each"]) == embedding["batches"] >= throughput.FEWEST_BATCHES
    assert embedding["real_tokens"] == sum(batch["real"] for batch in embedding["each"])
    assert 0 < embedding["padding"] < 1
    assert all(comparison["holds"] for comparison in embedding["three_way"])
    losses = trained["losses"]
    assert len(losses["original"]) == len(losses["patched"]) == trained["steps"]
    assert all(map(math.isfinite, losses["patched"]))
    assert losses["patched"][0] == pytest.approx(math.log(1024), abs=0.5)
    assert losses["patched"][-1] < losses["patched"][0]
    assert len(trained["predictions"]) >= 3
    assert "summary.json" in result.output.replace("\n", "")


@pytest.mark.full
def test_a_wrong_kernel_breaks_the_demo(tmp_path, monkeypatch, texts, tokenizer):
    # What training runs, and inference on a CPU.
    for holder, name in ((ops, "add_layer_norm"), (encoder_call.EncoderCall, "run")):
        right = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *args, right=right, **kwargs: right(*args, **kwargs) * 1.01)
    console = Console(quiet=True)
    scale = stages._QUICK
    model = stages._random_encoder(len(tokenizer), scale, seed=0)
    encoded = corpus.encode(tokenizer, texts[:64], longest=64)
    embedded = throughput.measure(model, encoded, pad=1, batch_size=8, budget=0.1, console=console)
    assert not embedded.holds
    assert all(isinstance(comparison, tolerance.Comparison) for comparison in embedded.comparisons)
    trained = training.train(
        tokenizer,
        texts,
        device=torch.device("cpu"),
        seed=0,
        layers=1,
        hidden=64,
        budget=0.1,
        console=console,
    )
    assert not trained.holds
    assert trained.largest_difference > 100 * max(trained.drift("control"))
