"""Whole models on a CPU, against what people run there today: `python -m benchmarks models` (make bench-models).

| part | what it does |
|---|---|
| roofs | copy bandwidth, products and multiply-adds of this machine, now |
| export | the model for ONNX Runtime and OpenVINO, in a process of its own |
| the workloads | one to four thousand tokens, all contenders in turns, answers checked against float64 |
| corpus | real text through roberta_kernels.encode, against peers that sort it by length and pad |
| training | forward + backward against transformers |
| scaling | ours and the best known peers over tokens, over padding, over threads |
| memory | a process for each contender |

A contender that cannot be had is named with the reason, and never stood in for. Everything goes into `models.json`,
which is written after every part.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import corpus, machine, timing
from benchmarks.engines import ENGINES, INPUTS, Engine
from benchmarks.gpu_suite.jobs import Job, run_jobs
from benchmarks.models import Prepared, Runner, compiled, model_config, original, patched, run_models
from benchmarks.results_file import save
from benchmarks.roofs import measure_roofs
from benchmarks.timing import Clock
from benchmarks.workloads import CPU_MODEL_BATCHES, SMOKE_MODEL_BATCHES, scaling_plan
from roberta_kernels import backends, patch, unpatch

SCHEMA = 1
QUANTIZED = ("bfloat16", "int8", "int8-dynamic")
PARTS = ("corpus", "training", "scaling", "memory")
_TRAINED = ("1x128", "8x128", "mixed32")
_IN_CORPUS = _IN_SCALING = ("ours", "HF sdpa", "ONNX Runtime")


# -- contenders -------------------------------------------------------------------------------------------------------


def _ours(quantization: str | None, *, smoke: bool) -> Runner:
    options = {} if quantization is None else {"quantization": quantization}
    missing = _no_kernels(smoke) or (_refused(options) if options else "")
    if quantization is None:
        return Runner(patched, "patched", ours=True, instead_of="HF sdpa", missing=missing)
    return Runner(
        functools.partial(patched, **options),
        f"patched, quantization={quantization!r}",
        ours=True,
        weights=quantization.partition("-")[0],
        # Weights alone are rounded: products are float32's, or no less.
        arithmetic="int8" if quantization == "int8-dynamic" else None,
        trains=False,
        missing=missing,
    )


def _no_kernels(smoke: bool) -> str:
    available = backends.available_backends()["cpu"]
    return "" if available or smoke else f"the backend cpu is missing: {available.detail}"


def _in_precision(precision: str) -> Callable[[Any], Callable[..., Any]]:
    """Patched, and called with this torch.set_float32_matmul_precision."""

    def prepare(model: Any) -> Callable[..., Any]:
        fast = patched(model)

        def run(**arguments: Any) -> Any:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                return fast(**arguments)
            finally:
                torch.set_float32_matmul_precision(before)

        return run

    return prepare


def _autocast(prepare: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Callable[..., Any]]:
    def prepare_it(model: Any) -> Callable[..., Any]:
        inside = prepare(model)

        def run(**arguments: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return inside(**arguments)

        return run

    return prepare_it


def _as_it_comes(model: Any) -> Any:
    return model


def _lower_precision(*, smoke: bool) -> dict[str, Runner]:
    """The same model with less than float32's precision, by the ways that torch has: ours, then transformers'."""
    missing = _no_kernels(smoke)
    rounded = {"weights": "bfloat16", "arithmetic": "bfloat16"}
    found = {}
    for precision, arithmetic in (("high", "three parts"), ("medium", "bfloat16")):
        # Where there are no tiles, these take float32's products, and are as exact.
        note = f'patched, torch.set_float32_matmul_precision("{precision}")'
        found[f"ours {precision}"] = Runner(
            _in_precision(precision), note, ours=True, arithmetic=arithmetic, trains=False, missing=missing
        )
    found["ours, bfloat16 model"] = Runner(
        lambda model: patched(model.to(torch.bfloat16)),
        "the model in bfloat16, patched",
        ours=True,
        instead_of="HF bfloat16 model",
        missing=missing,
        **rounded,
    )
    found["ours, autocast"] = Runner(
        _autocast(patched),
        "patched, under torch.autocast in bfloat16",
        ours=True,
        arithmetic="bfloat16",
        instead_of="HF autocast",
        missing=missing,
    )
    found["HF bfloat16 model"] = Runner(lambda model: model.to(torch.bfloat16), "the model in bfloat16", **rounded)
    found["HF autocast"] = Runner(_autocast(_as_it_comes), "under torch.autocast in bfloat16", arithmetic="bfloat16")
    return found


def _refused(options: dict[str, Any]) -> str:
    """Why patch() does not take these, or ""."""
    absent = options.keys() - inspect.signature(patch).parameters.keys()
    if absent:
        return f"patch() has no option {', '.join(sorted(absent))}"
    tiny = original("cpu", torch.float32, smoke=True, attention="sdpa")
    try:
        patch(tiny, **options)
        unpatch(tiny)
    except (ValueError, NotImplementedError, backends.BackendError) as error:
        return str(error).splitlines()[0]
    return ""


def _engine(engine: Engine, exported: Path | None, threads: int) -> Runner:
    def prepare(_: None) -> Callable[..., Any]:
        assert exported is not None
        session = engine.start(exported / engine.file, threads)

        def run(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            found = session(dict(zip(INPUTS, (input_ids.numpy(), mask.numpy()), strict=True)))
            return SimpleNamespace(last_hidden_state=torch.from_numpy(found))

        return run

    return Runner(
        prepare,
        engine.note,
        engine=True,
        weights=engine.weights,
        arithmetic=engine.arithmetic,
        trains=False,
        missing=engine.missing(),
    )


def contenders(exported: Path | None, threads: int, *, smoke: bool) -> dict[str, Runner]:
    """By name, those under test first. exported: the folder of benchmarks.engines, once there is one."""
    found = {"ours": _ours(None, smoke=smoke)}
    found |= {f"ours {name}": _ours(name, smoke=smoke) for name in QUANTIZED}
    lower = _lower_precision(smoke=smoke)
    found |= {name: runner for name, runner in lower.items() if runner.ours}
    found["HF eager"] = Runner(_as_it_comes, "transformers, attention in plain torch", attention="eager")
    found["HF sdpa"] = Runner(_as_it_comes, "transformers as it comes")
    found |= {name: runner for name, runner in lower.items() if not runner.ours}
    found["torch.compile"] = Runner(
        compiled(None),
        "the same under torch.compile, shapes dynamic, compile time not counted",
        compiled=True,
        missing="left out of a smoke run: compiling takes minutes" if smoke else "",
    )
    return found | {name: _engine(engine, exported, threads) for name, engine in ENGINES.items()}


# -- the run ----------------------------------------------------------------------------------------------------------


class CpuSuite:
    def __init__(self, out: Path, console: Console, *, only: Iterable[str] = (), smoke: bool = False) -> None:
        self.out = out
        self.console = console
        self.smoke = smoke
        self.batches = list(SMOKE_MODEL_BATCHES if smoke else CPU_MODEL_BATCHES)
        self.threads = torch.get_num_threads()
        self.known = contenders(None, self.threads, smoke=smoke)
        names = [batch.name for batch in self.batches]
        unknown = set(only) - {*names, *PARTS, *self.known}
        if unknown:
            known = ", ".join([*names, *PARTS, *self.known])
            raise ValueError(f"--only does not know {', '.join(sorted(unknown))}; there are {known}")
        parts = [part for part in only if part in {*names, *PARTS}]
        self.parts = set(parts) or {*names, *PARTS}
        self.wanted = {name for name in only if name in self.known} or set(self.known)
        self.batches = [batch for batch in self.batches if batch.name in self.parts]
        self.prepared: dict[str, Prepared] = {}
        self.results: dict[str, Any] = {
            "roberta_kernels_schema": SCHEMA,
            "whole_models": True,
            "quick": smoke,
            **machine.conditions("cpu"),
            "roofs": None,
            "unavailable": {},
            "benchmarks": [],
            "models": [],
            "scaling": [],
            "memory": [],
            "failures": [],
            "seconds": {},
        }

    @property
    def path(self) -> Path:
        return self.out / "models.json"

    def run(self) -> int:
        """Exit status: 1 where a contender of ours failed."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bench-models-") as folder, self._bar() as self.progress:
            self.work = Path(folder)
            self._since = time.monotonic()
            steps = 2 + len(self.batches) + len(self.parts & set(PARTS))
            self.task = self.progress.add_task("starting", total=steps)
            try:
                self._part("roofs", self._roofs)
                self._part("export", self._export)
                for name, runner in self.known.items():
                    if runner.missing and name in self.wanted:
                        self.results["unavailable"][name] = runner.missing
                        self.say(f"{name} is not measured: {runner.missing}")
                self._known = {
                    name: runner for name, runner in self.known.items() if name in self.wanted and not runner.missing
                }
                self._models(self.batches)
                for part in PARTS:
                    if part in self.parts:
                        self._part(part, getattr(self, f"_{part}"))
            finally:
                save(self.path, self.results)
        broken = [row for row in self.results["failures"] if row["broken"]]
        for row in broken:
            self.console.print(f"{row['contender']} in {row['case']}: {row['reason']}", style="red", markup=False)
        return 1 if broken else 0

    def say(self, line: str) -> None:
        self.progress.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _bar(self) -> Progress:
        columns = (TextColumn("[bold]{task.description:<46}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console)

    def _begin(self, case: str, contender: str) -> None:
        self.progress.update(self.task, description=f"{case.removeprefix('model-float32-')}: {contender}")

    def _part(self, name: str, part: Callable[[], None]) -> None:
        self.progress.update(self.task, description=name)
        part()
        self._done(name)

    def _done(self, name: str) -> None:
        """A part is: since the one before it."""
        now = time.monotonic()
        self.results["seconds"][name] = round(now - self._since, 1)
        self._since = now
        # As they stand in the list of contenders, and not as they were begun.
        cases = list(dict.fromkeys(row["case"] for row in self.results["models"]))
        order = list(self.known)
        self.results["models"].sort(key=lambda row: (cases.index(row["case"]), order.index(row["contender"])))
        self.progress.advance(self.task)
        save(self.path, self.results)

    def _take(self, event: dict[str, Any], rows: str = "models", **more: Any) -> None:
        if "model" in event:
            self.results[rows].append(event["model"] | more)
        if "failure" in event:
            self.results["failures"].append(event["failure"] | more)
            if not more:
                self.say(f"{event['failure']['contender']}: {event['failure']['reason']}")

    # -- parts --------------------------------------------------------------------------------------------------------

    def _roofs(self) -> None:
        self.results["roofs"] = measure_roofs("cpu", ("float32", "bfloat16"), Clock("cpu"), quick=self.smoke)

    def _export(self) -> None:
        """Without it, the engines are not there, and why."""
        self.exported = self.work
        wanted = [name for name in ENGINES if name in self.wanted and not self.known[name].missing]
        why = ""
        if wanted:
            command = [sys.executable, "-m", "benchmarks.engines", str(self.work), *(["--smoke"] if self.smoke else [])]
            job = Job("export", command, self.work / "export.log")
            run_jobs([job], parallel=1, deadline=time.time() + 600.0)
            why = "" if job.status == 0 else f"the export failed: {(job.tail.splitlines() or ['out of time'])[-1]}"
        self.known = contenders(self.work, self.threads, smoke=self.smoke)
        for name in wanted:
            if why:
                self.known[name] = Runner(lambda model: model, "", engine=True, missing=why)

    def _effort(self, effort: timing.Effort) -> timing.Effort:
        return timing.QUICK if self.smoke else effort

    def _run(self, batches: Iterable[Any], **options: Any) -> Iterable[dict[str, Any]]:
        options = {"known": self._known, "effort": self._effort(timing.MODELS), "begin": self._begin} | options
        return run_models(
            batches, device="cpu", roofs=self.results["roofs"], smoke=self.smoke, dtype_name="float32", **options
        )

    def _models(self, batches: list[Any]) -> None:
        names = iter(batches)
        for event in self._run(batches, directions=["forward"], prepared=self.prepared) if batches else ():
            self._take(event)
            if "done" in event:
                self._done(next(names).name)

    def _training(self) -> None:
        known = {n: r for n, r in self._known.items() if r.trains and not r.compiled}
        every = SMOKE_MODEL_BATCHES if self.smoke else [b for b in CPU_MODEL_BATCHES if b.name in _TRAINED]
        for event in self._run(every, directions=["forward_backward"], known=known):
            self._take(event)

    def _corpus(self) -> None:
        for event in corpus.run_corpus(
            {name: runner for name, runner in self._known.items() if name in _IN_CORPUS},
            self.prepared,
            config=model_config(smoke=self.smoke, attention="sdpa"),
            exact_model=original("cpu", torch.float32, smoke=self.smoke, attention="sdpa").double(),
            roofs=self.results["roofs"],
            effort=self._effort(timing.CORPUS),
            smoke=self.smoke,
            begin=self._begin,
        ):
            self._take(event)

    def _scaling(self) -> None:
        known = {name: runner for name, runner in self._known.items() if name in _IN_SCALING}
        series = scaling_plan(self.results["machine_info"]["cores"], smoke=self.smoke)
        options = {"directions": ["forward"], "check": False, "effort": self._effort(timing.SCALING)}
        for name in ("tokens", "padding"):
            for x, batch in series[name]:
                for event in self._run([batch], known=known, prepared=self.prepared, **options):
                    self._take(event, "scaling", series=name, x=x)
        torches = {name: made for name, made in self.prepared.items() if not self.known[name].engine}
        try:
            for threads, batch in series["threads"]:
                torch.set_num_threads(threads)
                fresh = contenders(self.exported, threads, smoke=self.smoke)  # an engine's threads are its session's
                for event in self._run([batch], known={n: fresh[n] for n in known}, prepared=dict(torches), **options):
                    self._take(event, "scaling", series="threads", x=threads)
        finally:
            torch.set_num_threads(self.threads)

    def _memory(self) -> None:
        if not Path("/proc/self/clear_refs").exists():
            self.say("memory is not measured: this system has no /proc/self/clear_refs")
            return
        self.prepared.clear()
        every = self.batches or (SMOKE_MODEL_BATCHES if self.smoke else CPU_MODEL_BATCHES)
        batches = sorted(every, key=lambda batch: batch.padded_tokens)
        jobs = []
        for name in self._known:
            order = self.work / f"memory-{len(jobs)}.json"
            told = {
                "contender": name,
                "smoke": self.smoke,
                "threads": self.threads,
                "exported": str(self.exported),
                "batches": [[batch.name, list(batch.lengths)] for batch in batches],
                "out": str(order.with_suffix(".out")),
            }
            order.write_text(json.dumps(told))
            command = [sys.executable, "-m", "benchmarks.memory", str(order)]
            jobs.append(Job(name, command, order.with_suffix(".log")))
        run_jobs(jobs, parallel=2, deadline=time.time() + 900.0)
        for index, job in enumerate(jobs):
            out = self.work / f"memory-{index}.out"
            if job.status != 0 or not out.is_file():
                reason = (job.tail.splitlines() or ["out of time"])[-1][:200]
                row = {"case": "memory", "contender": job.name, "reason": reason, "broken": self._known[job.name].ours}
                self._take({"failure": row})
                continue
            found = json.loads(out.read_text())
            for batch, peak in found["batches"].items():
                row = {"contender": job.name, "batch": batch, "peak_bytes": peak, "base_bytes": found["base_bytes"]}
                self.results["memory"].append(row)
