"""Time and peak memory of one training step of a masked language model: `python -m benchmarks.masked_lm`.

Three contenders: transformers as it is; patched; and patched with return_logits=False, whose loss is made without the
logits. Each runs in a process of its own: random weights of the named size, dropout as configured, batches without
padding, 15% of the tokens with a label. A step is forward and backward, with `--adamw` an optimizer's step too. Memory
is the most that was resident (Linux: the high-water mark of /proc/self/status) over all steps; time the median of the
steps after the first. Contenders do not run in turns: on a busy machine only memory means something.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import alone

CONTENDERS = ("transformers", "patched", "patched, return_logits=False")
# Of the checkpoints of these names; "tiny" is for the tests.
SIZES: dict[str, dict[str, Any]] = {
    "roberta-base": {"vocab_size": 50265},
    "xlm-roberta-base": {"vocab_size": 250002},
    "tiny": {"vocab_size": 5000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}
LABELLED = 0.15


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """What one contender takes, measured in this process."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    import roberta_kernels as rk

    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    base = _status("VmRSS")
    fixed = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    model = RobertaForMaskedLM(RobertaConfig(**fixed, **SIZES[order["size"]])).train()
    if order["contender"] != CONTENDERS[0]:
        rk.patch(model, return_logits=order["contender"] == CONTENDERS[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if order["adamw"] else None
    shape = (order["batch"], order["length"])
    seconds, losses = [], []
    for _ in range(order["steps"] + 1):
        ids = torch.randint(5, model.config.vocab_size, shape)
        labels = torch.where(torch.rand(shape) < LABELLED, ids, -100)
        labels[0, 1] = ids[0, 1]
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=order["bf16"]):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    return {"base_bytes": base, "peak_bytes": _status("VmHWM"), "seconds": seconds[1:], "losses": losses}


def table(order: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    step = "forward, backward and AdamW" if order["adamw"] else "forward and backward"
    what = f"{order['size']}, {order['batch']}x{order['length']} tokens, {LABELLED:.0%} labelled, {step}"
    numbers = "bfloat16 autocast" if order["bf16"] else "float32"
    lines = [
        f"{what}, {numbers}, {order['threads']} threads, {order['steps']} steps after a first one",
        "",
        "|  | peak memory | of it above the libraries | of transformers' | seconds a step | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(results.values()))
    for name, result in results.items():
        own, own_first = (r["peak_bytes"] - r["base_bytes"] for r in (result, first))
        took, took_first = (statistics.median(r["seconds"]) for r in (result, first))
        lines.append(
            f"| {name} | {result['peak_bytes'] / 1e9:.2f} GB | {own / 1e9:.2f} GB | {own / own_first:.2f} | "
            f"{took:.2f} | {took_first / took:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masked_lm", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="roberta-base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="after a first one, which is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adamw", action="store_true", help="an optimizer's step too")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    return alone.run("benchmarks.masked_lm", parser, CONTENDERS, arguments, measure=measure, table=table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
