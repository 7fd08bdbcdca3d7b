"""examples/pretrain.py: a run that was interrupted, and those in two processes, have the losses of a plain one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import RobertaForMaskedLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/models"))
from model_cases import SENTENCES, saved_model  # noqa: E402

EXAMPLE = ROOT / "examples/pretrain.py"
OPTIONS = (
    *("--length", "12", "--batch", "4", "--micro-batch", "1", "--steps", "6"),
    *("--warmup", "2", "--learning-rate", "1e-2", "--save", "3"),
)


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("pretrain", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES * 4))
    return path


@pytest.fixture
def folder(tmp_path):
    return saved_model(tmp_path / "model", RobertaForMaskedLM)


def arguments(text, out, folder):
    return [str(text), str(out), "--model", str(folder), *OPTIONS]


def losses(out):
    return json.loads((out / "losses.json").read_text())


def run(example, monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments(*given)])
    with torch.random.fork_rng():
        example.main()


def on_two_processes(text, out, folder, *more):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE),
         *arguments(text, out, folder), *more],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
def test_pretrain(example, text, folder, tmp_path, monkeypatch):
    whole, parts, pair = (tmp_path / name for name in ("whole", "parts", "pair"))
    run(example, monkeypatch, text, whole, folder)
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0]
    assert (whole / "loss.png").exists()
    assert type(RobertaForMaskedLM.from_pretrained(whole)) is RobertaForMaskedLM

    saved = example.save

    def interrupted(*args):
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(example, monkeypatch, text, parts, folder)
    assert len(losses(parts)) == 3
    monkeypatch.setattr(example, "save", saved)
    run(example, monkeypatch, text, parts, folder)
    assert losses(parts) == losses(whole), "bit for bit"

    on_two_processes(text, pair, folder)
    assert losses(pair) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.full
def test_pretrain_with_a_share_of_the_model_in_each_process(example, text, folder, tmp_path, monkeypatch):
    """FSDP2, from the beginning and from what one process saved."""
    whole, shared, continued = (tmp_path / name for name in ("whole", "shared", "continued"))
    saved = example.save

    def kept(out, *rest):
        saved(out, *rest)
        if not continued.exists():
            shutil.copytree(out, continued)

    monkeypatch.setattr(example, "save", kept)
    run(example, monkeypatch, text, whole, folder)
    assert len(losses(continued)) == 3
    want = RobertaForMaskedLM.from_pretrained(whole).state_dict()
    for out in (shared, continued):
        on_two_processes(text, out, folder, "--fsdp")
        assert losses(out) == pytest.approx(losses(whole), rel=1e-4)
        got = RobertaForMaskedLM.from_pretrained(out)
        assert got.config.architectures == ["RobertaForMaskedLM"]
        # Adam takes a gradient that is rounding for a step like any other, of 1e-2.
        torch.testing.assert_close(got.state_dict(), want, rtol=1e-3, atol=1e-2)


def test_shares_need_processes(example, text, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments(text, tmp_path / "out", folder), "--fsdp"])
    with pytest.raises(SystemExit):
        example.main()
    assert "torchrun" in capsys.readouterr().err
