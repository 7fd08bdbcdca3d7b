"""Time and peak memory of SPLADE: `python -m benchmarks.splade`.

A SparseEncoder of sentence-transformers with random weights of the named size, batches without padding. Contenders: as
it comes; with the chunk_size of its SpladePooling; patched; patched with return_logits=False, whose vectors are made
without the logits. Each runs in a process of its own. `--layers 1` leaves most of the encoder out, so that the head is
what is timed. Memory is the most that was resident beyond the model (Linux: the high-water mark of /proc/self/status);
time the median of the calls after a first one. Contenders do not run in turns. Where nothing is drawn (forward alone),
the means of their vectors must be the same but for rounding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import alone
from benchmarks.masked_lm import SIZES, _status

CHUNK = 16
_ROUNDING = 1e-4  # of a mean, in float32
CONTENDERS = ("stock", f"stock, chunk_size={CHUNK}", "patched", "patched, return_logits=False")


def _sparse_encoder(sizes: dict[str, Any], chunk: int | None) -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import RobertaConfig, RobertaForMaskedLM

    from roberta_kernels.demo.corpus import train_tokenizer

    fixed = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    with tempfile.TemporaryDirectory() as folder:
        RobertaForMaskedLM(RobertaConfig(**fixed, **sizes)).save_pretrained(folder)
        train_tokenizer(["a word", "another word"], 300).save_pretrained(folder)
        modules = [Transformer(folder, transformer_task="fill-mask"), SpladePooling(chunk_size=chunk)]
        return SparseEncoder(modules=modules, device="cpu")


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """What one contender takes, measured in this process."""
    import torch

    import roberta_kernels as rk

    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    sizes = SIZES[order["size"]] | ({} if order["layers"] is None else {"num_hidden_layers": order["layers"]})
    model = _sparse_encoder(sizes, CHUNK if "chunk" in order["contender"] else None).train(order["backward"])
    if order["contender"].startswith("patched"):
        rk.patch(model, return_logits="return_logits" not in order["contender"])
    ids = torch.randint(5, sizes["vocab_size"], (order["batch"], order["length"]))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    base, seconds, values = _status("VmRSS"), [], []
    for _ in range(order["calls"] + 1):
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        began = time.perf_counter()
        with torch.set_grad_enabled(order["backward"]):
            vectors = model(features)["sentence_embedding"]
            if order["backward"]:
                vectors.mean(0).square().sum().backward()  # SPLADE's regulariser
        seconds.append(time.perf_counter() - began)
        values.append(float(vectors.detach().double().mean()))
        model.zero_grad(set_to_none=True)
        del features, vectors
    return {"base_bytes": base, "peak_bytes": _status("VmHWM"), "seconds": seconds[1:], "means": values}


def table(order: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Markdown. Raises RuntimeError where a contender computed something else."""
    means = [result["means"][0] for result in results.values()]
    if not order["backward"] and max(means) - min(means) > _ROUNDING * max(means):
        raise RuntimeError(f"the contenders' vectors have the means {means}")
    what = "forward and backward" if order["backward"] else "forward"
    layers = "" if order["layers"] is None else f" of {order['layers']} layers"
    lines = [
        f"{order['size']}{layers}, {order['batch']}x{order['length']} tokens, {what}, float32, {order['threads']} "
        f"threads, {order['calls']} calls after a first one",
        "",
        "|  | peak memory beyond the model | seconds (least to most) | times as fast |",
        "|---|---|---|---|",
    ]
    first = statistics.median(next(iter(results.values()))["seconds"])
    for name, result in results.items():
        took, own = statistics.median(result["seconds"]), result["peak_bytes"] - result["base_bytes"]
        span = f"{min(result['seconds']):.2f} to {max(result['seconds']):.2f}"
        lines.append(f"| {name} | {own / 1e9:.2f} GB | {took:.2f} ({span}) | {first / took:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.splade", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="roberta-base")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--calls", type=int, default=3, help="after a first one, which is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backward", action="store_true", help="the gradients of all parameters too")
    return alone.run(
        "benchmarks.splade",
        parser,
        CONTENDERS,
        arguments,
        measure=measure,
        table=table,
        packages=("sentence-transformers",),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
