"""What Ray costs: a corpus by two workers of one thread each, against one process of two threads.

The texts are docstrings of Python's standard library in a JSONL file; the model has the size of all-MiniLM-L6-v2 and
random weights. Rates are of reading, tokenizing and encoding, with everything started; that of the whole run, from the
call to the last part, is given beside them. In turns, as everywhere: what disturbs the machine disturbs both; three
turns, or fewer where they would take more than some minutes.

* `start`: ray.init(), of a cluster on this machine.
* `first`: of a run of one row, from the call to the end: index, workers that start, import torch and load the model.
* `row`: of a run of a model so small that Ray and the files are what takes the time, over one that is `first`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.results_file import finish

SIZES = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
}
ROWS, WINDOW, TURNS, WORKERS, VOCABULARY = 2048, 256, 3, 2, 8000
BUDGET = 200.0  # seconds, after which no further turn is begun


def prepare(folder: Path, rows: int, *, smoke: bool) -> None:
    """Models with their tokenizer, and the texts. smoke: from few of them."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    from roberta_kernels.demo.corpus import docstrings, train_tokenizer

    texts = docstrings(400 if smoke else None)
    texts = (texts * (1 + rows // len(texts)))[:rows]
    tokenizer = train_tokenizer(texts[:4000], VOCABULARY)
    for name, size in SIZES.items():
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=514, pad_token_id=1, **size)
        RobertaModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, count in (("texts", rows), ("one", 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))


def load(path: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def alone(folder: Path, model: str, output: Path) -> int:
    """One process of as many threads as there are workers; prints its report."""
    import torch

    from roberta_kernels import encode

    torch.set_num_threads(WORKERS)
    report = encode(*load(str(folder / model)), folder / "texts.jsonl", output, overwrite=True, window=WINDOW)
    print(json.dumps(report.as_dict()))
    return 0


def measure(folder: Path, console: Console, *, smoke: bool) -> dict[str, Any]:
    import ray

    from roberta_kernels import ray as rk_ray

    prepare(folder, 40 if smoke else ROWS, smoke=smoke)
    results: dict[str, Any] = {
        "cluster": True,
        "quick": smoke,
        **machine.conditions("cpu", "ray", "pyarrow"),
    }
    began = time.perf_counter()
    ray.init(address="local", num_cpus=WORKERS, log_to_driver=False, logging_level="warning")
    results["start_s"] = time.perf_counter() - began

    def on_ray(model: str, texts: str, workers: int) -> rk_ray.RayReport:
        output = folder / "out"
        return rk_ray.encode(
            functools.partial(load, str(folder / model)),
            folder / f"{texts}.jsonl",
            output,
            workers=workers,
            window=WINDOW,
            overwrite=True,
        )

    if not smoke:
        on_ray("tiny", "one", 1)  # Ray Data itself is imported, and its first run prepared
    results |= {"first_s": [], "tokens_per_s": [], "tiny_s": [], "tiny_encoding_s": []}
    for turn in range(1, 1 + (1 if smoke else TURNS)):
        began_turn = time.perf_counter()
        results["first_s"].append(on_ray("MiniLM", "one", WORKERS).seconds)
        command = [sys.executable, "-m", "benchmarks.cluster", str(folder), "MiniLM", str(folder / "out.parquet")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        one, two = json.loads(done.stdout.splitlines()[-1]), on_ray("MiniLM", "texts", WORKERS)
        if one["tokens"] != two.tokens:
            raise RuntimeError("the two did not encode the same texts")
        steady = two.tokens / (two.worker_seconds / WORKERS)
        rates = {"alone": one["tokens_per_second"], "workers": steady, "whole_run": two.tokens_per_second}
        results["tokens_per_s"].append(rates)
        small = on_ray("tiny", "texts", WORKERS)
        results["rows"] = small.texts
        results["tiny_s"].append(small.seconds)
        results["tiny_encoding_s"].append(small.worker_seconds / WORKERS)
        now = time.perf_counter()
        console.print(f"turn {turn}: {now - began_turn:.0f} s", rates)
        if now - began + (now - began_turn) > BUDGET:
            break
    ray.shutdown()
    first = statistics.median(results["first_s"])
    results["row_us"] = statistics.median(
        1e6 * (whole - encoding - first) / results["rows"]
        for whole, encoding in zip(results["tiny_s"], results["tiny_encoding_s"], strict=True)
    )
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """The results in words."""
    info, turns = results["machine_info"], results["tokens_per_s"]
    rate = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    ratios = [turn["workers"] / turn["alone"] for turn in turns]
    ratio = f"{statistics.median(ratios):.2f} times, {min(ratios):.2f} to {max(ratios):.2f} in {len(turns)} turns"
    load, first = results["load_average_at_start"], statistics.median(results["first_s"])
    return [
        f"{results['rows']} docstrings, a model of MiniLM's size, {info['cpu']}, load {load:.1f}",
        f"one process of {WORKERS} threads: {rate['alone']:,.0f} tokens/s",
        f"{WORKERS} workers of one thread: {rate['workers']:,.0f} tokens/s while they encode ({ratio}), "
        f"{rate['whole_run']:,.0f} with starting and ending",
        f"Ray: {results['start_s']:.1f} s to start, {first:.1f} s from a call to its first row, "
        f"{results['row_us']:.0f} us a row",
    ]


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    """Writes cluster.json into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as work:
        results = measure(Path(work), console, smoke=arguments.smoke)
    finish(folder / "cluster.json", results, lines(results), console)
    return 0


if __name__ == "__main__":
    sys.exit(alone(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
