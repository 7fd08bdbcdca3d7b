"""The GPU suite: builds, tests, checks and measures on the GPU at hand, in slots of under ten minutes.

    python -m benchmarks gpu-suite --out FOLDER --slot 1       (make gpu-suite OUT=FOLDER SLOT=1)

| stage | slot | what it does |
|---|---|---|
| build | all | takes the CUDA library of `make gpu-bundle` where it is of these sources, else compiles it |
| machine | all | what there is; in slots 1 and 2 copy bandwidth and matrix rates, before the GPU is kept busy |
| variants | 1 | every variant of the CUDA kernels against float64, each in a process of its own, and that it ran |
| tests | 1 | all tests marked gpu but Triton's |
| kernels | 1, 2 | ops against their peers, answers checked first: RoBERTa-base in bfloat16, then the rest |
| models | 1, 2 | whole models against transformers |
| sanitizer | 3 | compute-sanitizer's memcheck and racecheck of our kernels, each variant by tests that run it |
| triton | 3 | Triton's tests |

Without --slot all three run one after another. Each writes FOLDER/slot-N: `results.json` as it goes, a Markdown report,
roofline plots, and one log. What was killed goes on where it was when it is run again with the same folder, commit and
card. `python -m benchmarks choose` takes the files of all slots.

Each stage has its own share of the time, and what one does not use the others have. A stage that fails, or a contender
in it, is recorded and the others run. A backend or a variant that is missing is a failure.

This process never uses the GPU, and does not import the package (the build replaces its library): gpu_suite/child.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite import bundle, plan
from benchmarks.gpu_suite.jobs import ROOT, Job, Running, run_jobs, stop
from benchmarks.gpu_suite.plan import LIMIT, SLOTS, STAGES, Tests
from benchmarks.gpu_suite.reading import Follower, card, failure_of, outcomes
from benchmarks.results_file import commit, save

_STALL = 100.0  # seconds without a word, after which a part hangs
_RESTARTS = 8
_WRITE_EVERY = 5.0
SCHEMA = 1
_MEASURED = ("kernels", "models")
_NO_TIME = "no time left"


class Stopped(BaseException):
    """Somebody ends the suite."""


class Suite:
    """One slot."""

    def __init__(self, arguments: argparse.Namespace, slot: int, say: Callable[[str], None] = print) -> None:
        self.slot = slot
        self.out: Path = arguments.out.resolve() / f"slot-{slot}"
        self.smoke: bool = arguments.smoke
        self.say = say
        self.began = time.time()
        self.limit: float = arguments.limit
        self.plan = [stage for stage in SLOTS[slot] if not arguments.only or stage.name in arguments.only]
        self.device = "cpu" if self.smoke else "cuda"
        self.package, self.bundle = ROOT / "roberta_kernels", bundle.FOLDER
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "suite.log"
        self.results: dict[str, Any] = self._before() or {
            "roberta_kernels_schema": SCHEMA,
            "suite": True,
            "slot": slot,
            "quick": self.smoke,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit_info": commit(),
            "card": None,
            "machine_info": None,
            "versions": {},
            "backends": {},
            "choices": [],
            "variants": {},
            "stages": {
                stage.name: {"status": "skipped", "reason": "not selected", "seconds": 0.0} for stage in SLOTS[slot]
            },
            "tests": {},
            "sanitizer": {},
            "roofs": None,
            "benchmarks": [],
            "models": [],
            "failures": [],
            "done": {part: [] for part in _MEASURED},
        }
        self._preparing: Running | None = None
        self._written = 0.0

    def _before(self) -> dict[str, Any] | None:
        """What a run of this slot left here that was stopped, of the same commit and card."""
        path = self.out / "results.json"
        if not path.is_file():
            self.log.write_text("")
            return None
        found = json.loads(path.read_text())
        same = found.get("slot") == self.slot and found["quick"] == self.smoke and found["commit_info"] == commit()
        if not same or found["card"] != card() or found["commit_info"]["dirty"]:
            self.say("what lies in the folder is of another commit or card, or of a tree with changes: begun anew")
            self.log.write_text("")
            return None
        self.say("goes on from what lies in the folder")
        found["failures"] = [failure for failure in found["failures"] if failure["reason"] != _NO_TIME]
        return found

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Exit status: 1 where a stage failed."""
        with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder, _ended_in_order():
            self.work = Path(folder)
            try:
                for stage in self.plan:
                    self._stage(stage)
            finally:
                self._write()
                self._end_preparing()
                self._write()
                self._report()
        failed = [stage for stage, told in self.results["stages"].items() if told["status"] == "failed"]
        self.say(
            f"slot {self.slot}: {time.time() - self.began:.0f} s; "
            + (f"FAILED: {', '.join(failed)}" if failed else "all passed")
        )
        return 1 if failed else 0

    def _stage(self, stage: plan.Stage) -> None:
        began = time.time()
        deadline = self._deadline(stage)
        told = self.results["stages"][stage.name]
        if told["status"] == "passed" and stage.name not in ("build", "machine"):
            self.say(f"{stage.name}: passed before")
            return
        told.update(status="running", reason="")
        self._write()
        self.say(f"{stage.name} ...")
        try:
            status, reason = getattr(self, f"_{stage.name}")(deadline)
        except Stopped as stopped:
            told.update(status="failed", reason=f"stopped by {stopped}", seconds=round(time.time() - began, 1))
            raise
        except Exception as error:  # a fault of the suite itself: the other stages run
            status, reason = "failed", f"{type(error).__name__}: {error}"
        told.update(status=status, reason=reason, seconds=round(time.time() - began, 1))
        self.say(f"{stage.name}: {status} in {told['seconds']:.0f} s" + (f"; {reason}" if reason else ""))
        self._write()

    def _deadline(self, stage: plan.Stage) -> float:
        """Of a stage that begins now: what it may take at most, less what the others are to keep."""
        later = self.plan[self.plan.index(stage) + 1 :]
        scale = self.limit / LIMIT
        kept = sum(other.kept for other in later) + plan.ENDING
        left = self.began + self.limit - kept * scale - time.time()
        return time.time() + min(stage.most * scale, max(left, 0.1 * stage.most * scale))

    def _write(self) -> None:
        self._written = time.monotonic()
        save(self.out / "results.json", self.results)

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > _WRITE_EVERY:
            self._write()

    def _python(self, name: str, *arguments: str, **environment: str) -> Job:
        return Job(name, [sys.executable, *arguments], self.work / f"{name.replace(' ', '-')}.log", environment)

    def _keep_log(self, job: Job) -> None:
        with self.log.open("a") as log:
            log.write(
                f"==== {job.name}: status {job.status}{', out of time' if job.late else ''}, {job.seconds:.0f} s\n"
            )
            if job.log.is_file():
                text = job.log.read_text(errors="replace")
                log.write(text if len(text) < 100_000 else text[:50_000] + "\n...\n" + text[-50_000:])

    # -- stages -------------------------------------------------------------------------------------------------------

    def _build(self, deadline: float) -> tuple[str, str]:
        self.results["card"] = found = card()
        if self.smoke:
            return "passed", "a smoke run builds nothing"
        if found is None:
            return "failed", "nvidia-smi names no GPU"
        major, minor = found["capability"].split(".")
        arch = f"{major}.{minor}{'a' if int(major) >= 9 else ''}"  # "a": what only this architecture has
        why_not = bundle.install(self.package, arch, self.bundle)
        if why_not is None:
            return "passed", "prebuilt"
        environment = {
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2)),
            "TORCH_CUDA_ARCH_LIST": arch,
            "ROBERTA_KERNELS_CUDA": "1",
            "CXXFLAGS": f"-g {os.environ.get('CXXFLAGS', '')}",  # the lines that the sanitizer names
            "ROBERTA_KERNELS_CPU": "0",
        }
        job = self._python("build", "setup.py", "build_ext", "--inplace", **environment)
        run_jobs([job], parallel=1, deadline=deadline)
        self._keep_log(job)
        if job.late:
            return "failed", f"out of time ({why_not})"
        if job.status != 0:
            return "failed", "; ".join([*job.tail.splitlines()[-1:], why_not])
        return "passed", f"built here: {why_not}"

    def _machine(self, deadline: float) -> tuple[str, str]:
        def take(event: dict[str, Any]) -> None:
            if "machine" in event:
                self.results["machine_info"] = event["machine"]
                for key in ("versions", "backends", "choices"):
                    self.results[key] = event[key]
                capability = event["machine"].get("gpu_capability")
                self.results["variants"] = plan.variants_on(event["variants"], capability) if capability else {}
            if "roofs" in event:
                self.results["roofs"] = event["roofs"]

        measures = any(stage.name in _MEASURED for stage in self.plan)
        status, reason = self._part("machine", deadline, take, measure_roofs=measures)
        if self.results["machine_info"] is None:
            return "failed", reason
        if measures and not self.smoke and any(stage.name == "tests" for stage in self.plan):
            self._begin_preparing()
        missing = [] if self.smoke else [n for n in ("cuda", "triton") if not self.results["backends"][n][0]]
        told = [f"backend {name} is missing: {self.results['backends'][name][1]}" for name in missing]
        return ("failed" if missing else status), "; ".join([*told, reason] if reason else told)

    def _variants(self, deadline: float) -> tuple[str, str]:
        chosen = self._smoke_tests("floor") if self.smoke else plan.variant_tests(self.results["variants"])
        return self._run_tests(chosen, deadline)

    def _tests(self, deadline: float) -> tuple[str, str]:
        chosen = plan.backend_tests(self.results["variants"])
        return self._run_tests(self._smoke_tests("wrong or exact") if self.smoke else chosen, deadline)

    def _triton(self, deadline: float) -> tuple[str, str]:
        chosen = self._smoke_tests("exact") if self.smoke else plan.triton_tests()
        return self._run_tests(chosen, deadline)

    def _sanitizer(self, deadline: float) -> tuple[str, str]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            return "failed", "compute-sanitizer is not on PATH"
        asked = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
        option = "--kernel-name" if "--kernel-name" in asked.stdout + asked.stderr else "--kernel-regex"
        self._checker = (program, "--error-exitcode", "99", option, f"kns={plan.OUR_KERNELS}")
        if not self.smoke and (unseen := self._unseen_faults(deadline)):
            return "failed", unseen
        smoke = [tests for tool in plan.SANITIZERS for tests in self._smoke_tests("exact", tool)]
        chosen = smoke if self.smoke else plan.sanitizer_tests(self.results["variants"])
        return self._run_tests(chosen, deadline, key="sanitizer")

    def _unseen_faults(self, deadline: float) -> str:
        """A kernel with a fault for each tool, which has to see it; "" if all do."""
        program = self.work / "canary"
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        source = ROOT / "benchmarks/gpu_suite/canary.cu"
        builds = Job("canary", [nvcc, "-arch=native", "-o", str(program), str(source)], self.work / "canary.log")
        run_jobs([builds], parallel=1, deadline=min(deadline, time.time() + 60.0))
        self._keep_log(builds)
        if builds.status != 0:
            return f"the faulty kernels could not be compiled: {(builds.tail.splitlines() or ['out of time'])[-1]}"
        jobs = []
        for tool in plan.SANITIZERS:
            command = [*self._checker, "--tool", tool, str(program), tool]
            jobs.append(Job(f"canary {tool}", command, self.work / f"canary-{tool}.log"))
        run_jobs(jobs, parallel=2, deadline=min(deadline, time.time() + 60.0))
        for job in jobs:
            self._keep_log(job)
        blind = [job.name.removeprefix("canary ") for job in jobs if job.status != 99]
        return f"no fault found in a faulty kernel, so none would be in ours: {', '.join(blind)}" if blind else ""

    @staticmethod
    def _smoke_tests(expression: str, tool: str | None = None) -> list[Tests]:
        name = " ".join(filter(None, (tool, expression)))
        take = 2 if tool else 0
        file = ("tests/ops/test_tolerance.py",)
        return [Tests(name, file, "others", expression=expression, take=take, tool=tool)]

    def _run_tests(self, chosen: list[Tests], deadline: float, key: str = "tests") -> tuple[str, str]:
        """Runs selections of tests, some processes at a time, and records what came of each."""
        jobs = {tests.name: [self._pytest(tests, i) for i in range(tests.shards)] for tests in chosen}
        told: dict[str, Any] = self.results[key]

        def record() -> None:
            """Those of which all processes have ended."""
            for tests in chosen:
                mine = jobs[tests.name]
                if tests.name not in told and all(job.status is not None for job in mine):
                    self._record(tests, mine, told)
            self._write_now_and_then()

        for tests in chosen:  # of a run before, say
            told.pop(tests.name, None)
        everything = [job for mine in jobs.values() for job in mine]
        run_jobs(everything, parallel=max(4, (os.cpu_count() or 2) - 2), deadline=deadline, tick=record)
        for tests in chosen:  # also those that were stopped
            self._record(tests, jobs[tests.name], told)
        for job in everything:
            self._keep_log(job)
        bad = [tests.name for tests in chosen if told[tests.name]["verdict"] != "passed"]
        reasons = [f"{name} {told[name]['verdict']}: {told[name]['why']}" for name in bad[:4]]
        if not chosen:
            return "failed", "there was nothing to run"
        return ("failed" if bad else "passed"), "; ".join([*reasons, *(["..."] if len(bad) > 4 else [])])

    @staticmethod
    def _record(tests: Tests, jobs: list[Job], told: dict[str, Any]) -> None:
        found = [outcomes(job) for job in jobs]
        status, why = plan.verdict(found)
        told[tests.name] = {**tests.described(), "verdict": status, "why": why, **plan.merged_outcomes(found)}

    def _pytest(self, tests: Tests, shard: int = 0) -> Job:
        name = tests.name + (f" {shard}" if tests.shards > 1 else "")
        arguments = [*tests.paths, *(f"--ignore={path}" for path in tests.left_out)]
        arguments += [] if self.smoke else ["-m", "gpu"]
        arguments += ["-k", tests.expression] if tests.expression else []
        environment = {
            "RK_SUITE_OUTCOMES": str(self.work / f"{name.replace(' ', '-')}.jsonl"),
            "RK_SUITE_BACKEND": tests.backend,
            "RK_SUITE_SHARD": f"{shard}/{tests.shards}" if tests.shards > 1 else "",
            "RK_SUITE_TAKE": str(tests.take),
            "RK_SUITE_VARIANT": f"{tests.op}={tests.variant}" if tests.forced else "",
            **self._environment(),
        }
        job = self._python(
            name,
            *("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_suite.outcomes"),
            # Not the project's own options: they name plugins that need not be here.
            *("-o", "addopts=--strict-markers"),
            *arguments,
            **environment,
        )
        if tests.tool is not None:
            quiet = ("--report-api-errors", "no") if tests.tool == "memcheck" else ()
            job.command[:0] = [*self._checker, "--tool", tests.tool, *quiet, "--target-processes", "all"]
            # Each tensor its own allocation: the caching allocator would hide what is beside it.
            job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        return job

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

        def take(event: dict[str, Any]) -> None:
            take_row(event)
            if "failure" in event:
                failures.append(event["failure"])

        status, reason = self._part(part, deadline, take)
        mine = [f for f in failures if f["case"].startswith("model-") == (part == "models")]
        broken = [f for f in mine if f["broken"]]
        if broken:
            names = ", ".join(dict.fromkeys(f"{f['contender']} in {f['case']}: {f['reason']}" for f in broken[:3]))
            return "failed", f"{len(broken)} measurements of ours failed ({names}{', ...' if len(broken) > 3 else ''})"
        missing = sum(f["reason"] == _NO_TIME for f in mine)
        told = [f"{missing} measurements left out for want of time"] if missing else []
        if not rows:
            return "failed", reason or "nothing was measured"
        return status, "; ".join([*told, reason] if reason else told)

    # -- parts in processes of their own ------------------------------------------------------------------------------

    def _part(self, part: str, deadline: float, take: Callable[[dict[str, Any]], None], **more: Any) -> tuple[str, str]:
        """Runs a part of child.py to its end, again without the contender that stopped it where one did."""
        events = self.work / f"{part}.jsonl"
        done: list[str] = self.results["done"].get(part, [])
        excluded: list[list[str]] = []
        told: list[str] = []
        for attempt in range(_RESTARTS + 1):
            job = self._child(f"{part}-{attempt}", part, deadline - 3.0, events, done=done, excluded=excluded, **more)
            follow = Follower(events)
            finished = False
            last: list[str] | None = None

            def tick() -> None:
                nonlocal finished, last
                for event in follow.events():  # noqa: B023
                    if "begin" in event:
                        last = event["begin"]
                    if event.get("finished"):
                        finished = True
                    if "done" in event:
                        done.append(event["done"])
                    take(event)
                self._write_now_and_then()

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
        """What a case that is measured again had already given."""
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
                    "slot": self.slot,
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
                stop([self._preparing])
            self._keep_log(self._preparing.job)
            self._preparing = None

    # -- what came of it ----------------------------------------------------------------------------------------------

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


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Inside, a signal that asks this process to end raises Stopped: results are written, and what runs is ended."""

    def stopped(number: int, _: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    try:
        before = {number: signal.signal(number, stopped) for number in numbers}
    except ValueError:  # not in the main thread (a test): signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--slot", action="append", type=int, choices=SLOTS, help="only this slot (repeatable)")
    parser.add_argument("--only", action="append", choices=STAGES, help="only this stage (repeatable)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a slot; default: %(default)s")
    parser.add_argument(
        "--smoke", action="store_true", help="the whole suite on a CPU, tiny: proves that it runs, measures nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 where a stage failed, 143 where it was stopped."""
    try:
        suites = (Suite(arguments, slot, lambda line: print(line, flush=True)) for slot in arguments.slot or SLOTS)
        return max(suite.run() for suite in suites)
    except Stopped:
        return 128 + signal.SIGTERM
