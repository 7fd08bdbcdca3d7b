"""Masked-language-model pretraining with patched models: `python examples/pretrain.py TEXT OUT --model NAME_OR_FOLDER`.

One process, or as many as torchrun starts: `torchrun --nproc-per-node 2 examples/pretrain.py ...`, each with a copy of
the model (DDP) or, with --fsdp, a share of it (FSDP2). The batch of a step, its masks and its loss do not depend on how
many there are. Every --save steps OUT holds all that is needed to go on: the same command continues, on however many
processes, with the numbers of a run that was never interrupted. OUT/loss.png (matplotlib) is the curve.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    get_linear_schedule_with_warmup,
)

import roberta_kernels as rk

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # not a process' share of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="one document a line")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="its configuration and tokenizer; weights are new")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step, over all processes")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences that a process computes at a time")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--save", type=int, default=100)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="processes of torchrun share parameters and optimizer")
    given = parser.parse_args()

    parallel = "RANK" in os.environ  # started by torchrun
    if given.fsdp and not parallel:
        parser.error("--fsdp needs processes to share the model: start them by torchrun")
    if parallel:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = [i for line in given.text.open() for i in tokenizer(line.strip(), truncation=False)["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // given.length * given.length]).view(-1, given.length)
    collate = DataCollatorForLanguageModeling(tokenizer)  # draws other masks in each step

    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(given.model)).to(device).train()
    if rank == 0:
        print(rk.patch(model, return_logits=False))
    else:
        rk.patch(model, return_logits=False)
    trained = model
    if given.fsdp:
        for layer in model.base_model.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    elif parallel:
        trained = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, given.warmup, given.steps)
    checkpoint, losses = given.out / "checkpoint.pt", []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu")
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(model, optimizer, **states, options=WHOLE)
        schedule.load_state_dict(saved["schedule"])
        losses = saved["losses"]

    for step in range(len(losses), given.steps):
        torch.manual_seed(step)  # the batch and its masks are the step's, in any process and after any interruption
        batch = collate([{"input_ids": row} for row in rows[torch.randint(len(rows), (given.batch,))]])
        count = (batch["labels"] != -100).sum()  # in all processes
        torch.manual_seed(given.steps + step * world + rank)  # dropout
        micro = batch["input_ids"][rank::world].split(given.micro_batch)
        labels = batch["labels"][rank::world].split(given.micro_batch)
        total = torch.zeros((), device=device)
        for i, (input_ids, wanted) in enumerate(zip(micro, labels, strict=True)):
            last = i == len(micro) - 1
            if given.fsdp:
                model.set_requires_gradient_sync(last)
            alone = last or given.fsdp or not parallel
            with contextlib.nullcontext() if alone else trained.no_sync():
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=given.bf16):
                    loss = trained(input_ids=input_ids.to(device), labels=wanted.to(device)).loss
                # The mean over these labels -> their share of the mean over all; none: nan, which counts for nothing.
                share = loss.float().nan_to_num() * ((wanted != -100).sum() / count).to(device)
                (share * world).backward()  # DDP and FSDP take the mean over processes
            total += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if parallel:
            dist.all_reduce(total)
        losses.append(float(total))
        if (step + 1) % given.save == 0 or step + 1 == given.steps:
            states = get_state_dict(model, optimizer, options=WHOLE)  # of all processes
            if rank == 0:
                save(given.out, model, tokenizer, *states, schedule, losses)
    if parallel:
        # Gloo's threads let go of the last sum first: DDP's end waits for them with Python's lock, which they may need.
        dist.barrier()
        dist.destroy_process_group()


def save(out: Path, model, tokenizer, weights, optimizer, schedule, losses: list[float]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, state_dict=dict(weights))  # as transformers' own class
    tokenizer.save_pretrained(out)
    (out / "losses.json").write_text(json.dumps(losses))
    state = {"model": weights, "optimizer": optimizer, "schedule": schedule.state_dict()}
    torch.save(state | {"losses": losses}, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # never half a checkpoint
    print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots()
        axis.plot(range(1, len(losses) + 1), losses)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        figure.savefig(out / "loss.png", dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
