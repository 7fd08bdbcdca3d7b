"""The GPU suite: one command that builds, tests, checks and measures on the GPU at hand, in under ten minutes.

    python -m benchmarks gpu-suite --out FOLDER       (make gpu-suite OUT=FOLDER)

| stage | what it does |
|---|---|
| build | compiles csrc/ in place for the architecture at hand |
| roofs | copy bandwidth and matrix rates, before anything else keeps the GPU busy |
| tests | the tests marked gpu, each file in a process of its own, those of the cuda backend apart |
| sanitizer | compute-sanitizer's memcheck and racecheck on some op tests of the cuda backend |
| kernels | each op against its peers, answers checked before they are timed |
| models | whole models against transformers |

Each stage has its own share of the time, and what one does not use the others have. A stage that fails, or a contender
in it, is recorded and the others run. `results.json` is written after every stage and while they run. Besides it: a
Markdown report, roofline plots, and one log.

This process never uses the GPU, and does not import the package (the build replaces its libraries): gpu_suite/child.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.jobs import ROOT, Job, Running, run_jobs
from benchmarks.results_file import commit, save

# this process imports no torch
OPS = ("attention", "add_layer_norm", "gelu_ffn", "embedding_layer_norm", "linear_cross_entropy")
STAGES = ("build", "roofs", "tests", "sanitizer", "kernels", "models")
# Seconds that a stage may take at most.
BUDGETS = {"build": 200.0, "roofs": 45.0, "tests": 170.0, "sanitizer": 110.0, "kernels": 190.0, "models": 170.0}
# What is kept for the stages after it, of the whole limit.
_RESERVED = {"build": 330.0, "roofs": 300.0, "tests": 260.0, "sanitizer": 200.0, "kernels": 105.0, "models": 12.0}
LIMIT = 570.0
_STALL = 100.0  # seconds without a word, after which a part hangs
_RESTARTS = 8
SCHEMA = 1


class Suite:
    def __init__(self, arguments: argparse.Namespace, say: Callable[[str], None] = print) -> None:
        self.out: Path = arguments.out.resolve()
        self.smoke: bool = arguments.smoke
        self.say = say
        self.began = time.time()
        self.limit: float = arguments.limit
        self.selected = [
            stage
            for stage in STAGES
            if (not arguments.only or stage in arguments.only) and stage not in (arguments.skip or ())
        ]
        self.device = "cpu" if self.smoke else "cuda"
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "suite.log"
        self.log.write_text("")
        self.results: dict[str, Any] = {
            "roberta_kernels_schema": SCHEMA,
            "suite": True,
            "quick": self.smoke,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit_info": commit(),
            "arch": None,
            "machine_info": None,
            "versions": {},
            "backends": {},
            "choices": [],
            "variants": {},
            "stages": {stage: {"status": "skipped", "reason": "not selected", "seconds": 0.0} for stage in STAGES},
            "tests": {},
            "sanitizer": {},
            "roofs": None,
            "benchmarks": [],
            "models": [],
            "failures": [],
        }
        self._preparing: Running | None = None
        self._sanitizing: list[Job] = []
        self._sanitizer_thread: threading.Thread | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Exit status: 1 where a stage failed."""
        with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
            self.work = Path(folder)
            try:
                for stage in STAGES:
                    if stage in self.selected:
                        self._stage(stage)
                    elif stage == "roofs":
                        self._machine(measure_roofs=bool({"kernels", "models"} & set(self.selected)))
            finally:
                self._end_preparing()
                self._write()
                self._report()
        failed = [stage for stage, told in self.results["stages"].items() if told["status"] == "failed"]
        self.say(f"{time.time() - self.began:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"))
        return 1 if failed else 0

    def _stage(self, stage: str) -> None:
        began = time.time()
        deadline = self._deadline(stage, BUDGETS[stage])
        told = self.results["stages"][stage]
        told.update(status="running", reason="")
        self.say(f"{stage} ...")
        try:
            status, reason = getattr(self, f"_{stage}")(deadline)
        except Exception as error:  # a fault of the suite itself: the other stages run
            status, reason = "failed", f"{type(error).__name__}: {error}"
        told.update(status=status, reason=reason, seconds=round(time.time() - began, 1))
        self.say(f"{stage}: {status} in {told['seconds']:.0f} s" + (f"; {reason}" if reason else ""))
        self._write()

    def _deadline(self, stage: str, budget: float) -> float:
        """Of a stage that begins now."""
        now = time.time()
        left = self.began + self.limit * (1.0 - _RESERVED[stage] / LIMIT) - now
        return now + min(budget, max(left, 0.1 * budget))

    def _write(self) -> None:
        save(self.out / "results.json", self.results)

    def _python(self, name: str, *arguments: str, **environment: str) -> Job:
        return Job(name, [sys.executable, *arguments], self.work / f"{name}.log", environment)

    def _keep_log(self, job: Job) -> None:
        with self.log.open("a") as log:
            log.write(
                f"==== {job.name}: status {job.status}{', out of time' if job.late else ''}, {job.seconds:.0f} s\n"
            )
            if job.log.is_file():
                text = job.log.read_text(errors="replace")
                log.write(text if len(text) < 200_000 else text[:100_000] + "\n...\n" + text[-100_000:])

    # -- stages -------------------------------------------------------------------------------------------------------

    def _build(self, deadline: float) -> tuple[str, str]:
        arch = self._ask_arch(deadline)
        self.results["arch"] = arch
        if arch is None and not self.smoke:
            return "failed", "torch finds no CUDA device"
        environment = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))}
        if arch is not None:
            environment |= {"TORCH_CUDA_ARCH_LIST": arch, "ROBERTA_KERNELS_CUDA": "1"}
        command = ["--version"] if self.smoke else ["build_ext", "--inplace"]
        [job] = run_jobs([self._python("build", "setup.py", *command, **environment)], parallel=1, deadline=deadline)
        self._keep_log(job)
        return self._verdict([job])

    def _ask_arch(self, deadline: float) -> str | None:
        """As TORCH_CUDA_ARCH_LIST takes it; "a" for the instructions that only this architecture has."""
        code = "import torch; print(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=deadline - time.time(), cwd=ROOT
        )
        numbers = [int(word) for word in done.stdout.split()]
        return f"{numbers[0]}.{numbers[1]}{'a' if numbers[0] >= 9 else ''}" if len(numbers) == 2 else None

    def _roofs(self, deadline: float) -> tuple[str, str]:
        status, reason = self._machine(measure_roofs=True, deadline=deadline)
        wanted = set(self.selected)
        if not self.smoke and wanted & {"kernels", "models"} and wanted & {"tests", "sanitizer"}:
            self._begin_preparing()
        return status, reason

    def _machine(self, *, measure_roofs: bool, deadline: float | None = None) -> tuple[str, str]:
        """Also where the stage is not selected: what the machine is stands in every result."""

        def take(event: dict[str, Any]) -> None:
            if "machine" in event:
                self.results["machine_info"] = event["machine"]
                for key in ("versions", "backends", "choices", "variants"):
                    self.results[key] = event[key]
            if "roofs" in event:
                self.results["roofs"] = event["roofs"]

        deadline = deadline or time.time() + BUDGETS["roofs"]
        status, reason = self._part("machine", deadline, take, measure_roofs=measure_roofs)
        if self.results["machine_info"] is None:
            return "failed", reason
        if not self.smoke:
            missing = [name for name in ("cuda", "triton") if not self.results["backends"][name][0]]
            told = [f"backend {name} is missing: {self.results['backends'][name][1]}" for name in missing]
            reason = "; ".join([*told, reason] if reason else told)
        return status, reason

    def _tests(self, deadline: float) -> tuple[str, str]:
        if "sanitizer" in self.selected:
            self._begin_sanitizing()
        jobs = [self._pytest(f"tests-{name}", arguments) for name, arguments in self._test_files().items()]
        for op, variant in self._variants():
            arguments = [f"tests/ops/test_{op}.py", "-m", "gpu", "-k", "cuda-"]
            jobs.append(self._pytest(f"tests-{op} cuda {variant}", arguments, variant=f"{op}={variant}"))
        run_jobs(jobs, parallel=max(2, (os.cpu_count() or 2) // 2), deadline=deadline)
        for job in jobs:
            self.results["tests"][job.name.removeprefix("tests-")] = outcomes(job)
            self._keep_log(job)
        # 5: nothing was selected in that file.
        return self._verdict([job for job in jobs if job.status != 5], self.results["tests"])

    def _test_files(self) -> dict[str, list[str]]:
        if self.smoke:
            return {"tolerance": ["tests/ops/test_tolerance.py", "-k", "floor or wrong or exact"]}
        found = {}
        for path in sorted((ROOT / "tests/ops").glob("test_*.py")):
            name = path.stem.removeprefix("test_")
            file = str(path.relative_to(ROOT))
            # Apart: a kernel that fails for good takes the rest of its process's tests with it.
            found[f"{name} cuda"] = [file, "-m", "gpu", "-k", "cuda-"]
            found[name] = [file, "-m", "gpu", "-k", "not cuda-"]
        for folder in ("triton", "models"):
            found[folder] = [f"tests/{folder}", "-m", "gpu"]
        return found

    def _variants(self) -> list[tuple[str, str]]:
        """(op, variant) beyond the portable ones, with which every other test runs."""
        if self.smoke:
            return []
        return [(op, variant) for op, known in self.results["variants"].items() for variant in known[1:]]

    def _pytest(
        self, name: str, arguments: list[str], before: tuple[str, ...] = (), take: int = 0, variant: str = ""
    ) -> Job:
        job = self._python(
            name,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            "benchmarks.gpu_suite.outcomes",
            # Not the project's own options: they name plugins that need not be here.
            "-o",
            "addopts=--strict-markers",
            *arguments,
            RK_SUITE_OUTCOMES=str(self.work / f"{name}.jsonl"),
            RK_SUITE_TAKE=str(take),
            RK_SUITE_VARIANT=variant,
            **self._environment(),
        )
        job.command[:0] = before
        return job

    def _begin_sanitizing(self) -> None:
        """Beside the tests: it needs the time more than the GPU."""
        program = shutil.which("compute-sanitizer")
        if program is None or (not self.smoke and not self.results["backends"].get("cuda", [False])[0]):
            return
        names = ("tolerance",) if self.smoke else OPS
        checked = [*((name, "") for name in names), *self._variants()]
        for tool in ("memcheck", "racecheck"):
            for name, variant in checked:
                # Its own exit status is told apart from pytest's.
                before = (program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all")
                selection = [f"tests/ops/test_{name}.py"]
                selection += [] if self.smoke else ["-m", "gpu", "-k", "cuda-"]
                job = self._pytest(
                    "-".join(filter(None, (tool, name, variant))),
                    selection,
                    before,
                    take=2 if self.smoke else 6,
                    variant=variant and f"{name}={variant}",
                )
                # Each tensor its own allocation: the caching allocator would hide what is beside it.
                job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
                self._sanitizing.append(job)
        deadline = self._deadline("sanitizer", BUDGETS["tests"] + BUDGETS["sanitizer"])
        options = {"parallel": max(2, (os.cpu_count() or 1) // 2), "deadline": deadline}
        self._sanitizer_thread = threading.Thread(target=run_jobs, args=(self._sanitizing,), kwargs=options)
        self._sanitizer_thread.start()

    def _sanitizer(self, deadline: float) -> tuple[str, str]:
        if shutil.which("compute-sanitizer") is None:
            return "skipped", "compute-sanitizer is not on PATH"
        if not self._sanitizing:
            self._begin_sanitizing()
        if self._sanitizer_thread is None:
            return "skipped", "there is no cuda backend to check"
        self._sanitizer_thread.join()
        for job in self._sanitizing:
            self.results["sanitizer"][job.name] = {**outcomes(job), "exit_status": job.status}
            self._keep_log(job)
        return self._verdict([job for job in self._sanitizing if job.status != 5], self.results["sanitizer"])

    def _kernels(self, deadline: float) -> tuple[str, str]:
        self._end_preparing()
        rows = self.results["benchmarks"]
        return self._measured(
            "kernels", deadline, lambda e: rows.append({"extra_info": e["row"]}) if "row" in e else None, rows
        )

    def _models(self, deadline: float) -> tuple[str, str]:
        self._end_preparing()
        rows = self.results["models"]
        return self._measured("models", deadline, lambda e: rows.append(e["model"]) if "model" in e else None, rows)

    def _measured(
        self, part: str, deadline: float, take_row: Callable[[dict[str, Any]], None], rows: list[Any]
    ) -> tuple[str, str]:
        if self.results["roofs"] is None:
            return "failed", "the roofs were not measured"
        failures = self.results["failures"]
        first = len(failures)

        def take(event: dict[str, Any]) -> None:
            take_row(event)
            if "failure" in event:
                failures.append(event["failure"])

        status, reason = self._part(part, deadline, take)
        broken = [f for f in failures[first:] if f["broken"]]
        if broken:
            names = ", ".join(dict.fromkeys(f"{f['contender']} in {f['case']}: {f['reason']}" for f in broken[:3]))
            return "failed", f"{len(broken)} measurements of ours failed ({names}{', ...' if len(broken) > 3 else ''})"
        missing = sum(f["reason"] == "no time left" for f in failures[first:])
        told = [f"{missing} measurements left out for want of time"] if missing else []
        if not rows:
            return "failed", reason or "nothing was measured"
        return status, "; ".join([*told, reason] if reason else told)

    # -- parts in processes of their own ------------------------------------------------------------------------------

    def _part(self, part: str, deadline: float, take: Callable[[dict[str, Any]], None], **more: Any) -> tuple[str, str]:
        """Runs a part of child.py to its end, again without the contender that stopped it where one did."""
        events = self.work / f"{part}.jsonl"
        done: list[str] = []
        excluded: list[list[str]] = []
        told: list[str] = []
        for attempt in range(_RESTARTS + 1):
            job = self._child(f"{part}-{attempt}", part, deadline - 3.0, events, done=done, excluded=excluded, **more)
            follow = Follower(events)
            written = time.monotonic()
            finished = False
            last: list[str] | None = None
            pending: list[dict[str, Any]] = []

            def tick() -> None:
                nonlocal written, finished, last
                for event in follow.events():  # noqa: B023
                    if "begin" in event:
                        last = event["begin"]
                    if event.get("finished"):
                        finished = True
                    if "done" in event:
                        done.append(event["done"])
                    if {"row", "model", "failure"} & event.keys():
                        pending.append(event)  # noqa: B023
                    take(event)
                if time.monotonic() - written > 20.0:
                    written = time.monotonic()
                    self._write()

            job.stalled = lambda follow=follow: follow.quiet() > _STALL
            run_jobs([job], parallel=1, deadline=deadline, tick=tick)
            tick()
            self._keep_log(job)
            if finished:
                return "passed", "; ".join(told)
            if time.time() > deadline - 10.0:
                told.append("stopped for want of time")
                return ("passed" if done else "failed"), "; ".join(told)
            how = "said nothing for too long" if job.late else f"ended with status {job.status}"
            what = follow.reason or (job.tail.splitlines() or [""])[-1]
            if last is None or attempt == _RESTARTS:
                return "failed", "; ".join([*told, f"{how}: {what}"])
            case, contender = last
            op = case.partition("-")[0]
            again = any(c.startswith(f"{op}-") and name == contender for c, name in excluded)
            excluded.append([f"{op}-*" if again else case, contender])
            told.append(f"{contender} in {case} {how}: {what}"[:300])
            self._forget(case)
            take({"failure": failure_of(case, contender, f"{how}: {what}"[:200])})
            events.unlink(missing_ok=True)
        raise AssertionError

    def _forget(self, case: str) -> None:
        """What a case that is measured again had already told."""
        for key in ("failures", "models"):
            kept = [row for row in self.results[key] if row["case"] != case or "ended" in row.get("how", "")]
            self.results[key][:] = kept
        self.results["benchmarks"][:] = [r for r in self.results["benchmarks"] if r["extra_info"]["case"] != case]

    def _child(self, name: str, part: str, deadline: float, events: Path, **more: Any) -> Job:
        order = self.work / f"{name}-order.json"
        more.setdefault("measure_roofs", False)
        order.write_text(
            json.dumps(
                {
                    "part": part,
                    "events": str(events),
                    "device": self.device,
                    "smoke": self.smoke,
                    "deadline": deadline,
                    "roofs": self.results["roofs"],
                    **more,
                }
            )
        )
        return self._python(name, "-m", "benchmarks.gpu_suite.child", str(order), **self._environment())

    def _environment(self) -> dict[str, str]:
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        if not self.smoke:
            # Shared by the tests, the parts, and the one that prepares for the others.
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / "build" / "gpu-suite" / "inductor")
            environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "gpu-suite" / "triton")
        return environment

    def _begin_preparing(self) -> None:
        job = self._child("prepare", "prepare", self.began + self.limit, self.work / "prepare.jsonl")
        self._preparing = Running(job)

    def _end_preparing(self) -> None:
        """Before anything is timed."""
        if self._preparing is not None:
            if not self._preparing.poll():
                self._preparing.job.late = True
                self._preparing.stop()
            self._keep_log(self._preparing.job)
            self._preparing = None

    # -- what came of it ----------------------------------------------------------------------------------------------

    @staticmethod
    def _verdict(jobs: list[Job], counts: dict[str, dict[str, Any]] | None = None) -> tuple[str, str]:
        late = [job.name for job in jobs if job.late]
        failed = [job.name for job in jobs if not job.late and job.status != 0]
        if counts is not None and not failed and not late and not any(c.get("passed", 0) for c in counts.values()):
            return "failed", "no test ran"
        told = [f"{', '.join(failed)} failed"] if failed else []
        told += [f"{', '.join(late)} ran out of time"] if late else []
        if failed and counts is None:
            told += [job.tail.splitlines()[-1] for job in jobs if job.name in failed and job.tail]
        return ("failed" if told else "passed"), "; ".join(told)

    def _report(self) -> None:
        from benchmarks import report

        images: list[Path] = []
        if self.results["benchmarks"] and self.results["roofs"]:
            if importlib.util.find_spec("matplotlib") is None:
                self.say("no plots: matplotlib is not installed")
            else:
                with contextlib.ExitStack() as stack:
                    stack.callback(self._write)
                    try:
                        from benchmarks import plots

                        images = plots.write_rooflines(self.results, self.out)
                    except Exception as error:
                        self.say(f"no plots: {type(error).__name__}: {error}")
        (self.out / "results.md").write_text(report.suite_markdown(self.results, [image.name for image in images]))
        self.say(f"wrote results.json, results.md, suite.log and {len(images)} plots into {self.out.name}")


class Follower:
    """Reads what a part writes, as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reason = ""
        self._at = path.stat().st_size if path.is_file() else 0
        self._heard = time.monotonic()

    def events(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open() as stream:
            stream.seek(self._at)
            text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        self._at += len(whole.encode())
        found = [json.loads(line) for line in whole.splitlines()]
        if found:
            self._heard = time.monotonic()
        for event in found:
            self.reason = event.get("reason", self.reason) if "poisoned" in event else self.reason
        return found

    def quiet(self) -> float:
        """Seconds since it said anything."""
        return time.monotonic() - self._heard


def failure_of(case: str, contender: str, reason: str) -> dict[str, Any]:
    """A contender that took its process with it. Ours are broken then; a peer is its maker's affair."""
    parts = case.split("-")
    ours = contender.startswith(("ours", "cuda", "triton", "cpu", "reference"))
    described = {"case": case, "contender": contender, "reason": reason, "broken": ours, "how": "ended the process"}
    if parts[0] != "model" and len(parts) == 5:
        described |= {"op": parts[0], "dtype": parts[2], "direction": parts[3], "batch": {"name": parts[4]}}
    return described


def outcomes(job: Job) -> dict[str, Any]:
    """Counts of a pytest job, and the first that failed, from what the plugin wrote."""
    path = Path(job.environment["RK_SUITE_OUTCOMES"])
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "collected": 0}
    failed = []
    ended = set()
    begun = None
    for event in events:
        counts["collected"] = event.get("collected", counts["collected"])
        begun = event.get("begin", begun)
        if "test" in event:
            counts[event["outcome"]] += 1
            ended.add(event["test"])
            if event["outcome"] == "failed":
                failed.append(f"{event['test']}: {event['says']}")
    if job.status not in (0, 1, 5) and begun is not None and begun not in ended:
        failed.append(f"{begun}: did not end (status {job.status})")
    return {**counts, "seconds": round(job.seconds, 1), "out_of_time": job.late, "failures": failed[:20]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--only", action="append", choices=STAGES, help="only this stage (repeatable)")
    parser.add_argument("--skip", action="append", choices=STAGES, help="not this stage (repeatable)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all; default: %(default)s")
    parser.add_argument(
        "--smoke", action="store_true", help="the whole suite on a CPU, tiny: proves that it runs, measures nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    return Suite(arguments, lambda line: print(line, flush=True)).run()
