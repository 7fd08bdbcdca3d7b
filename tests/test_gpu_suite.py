"""The GPU suite runs end to end without a GPU, survives what can go wrong in it, and its results make a table."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from roberta_kernels import backends
from roberta_kernels.backends import choosing

ROOT = Path(__file__).parents[1]
pytest.importorskip("pytest_benchmark")

SANITIZER = """#!/bin/sh
case "$*" in *--help*) exit 0 ;; esac
while [ "$1" != "-m" ]; do last=$1; shift; done
exec "$last" "$@"
"""


@pytest.fixture(scope="module", autouse=True)
def repository():
    """The benchmarks are no part of the package, and are imported from the repository."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> Path:
    """The folder that a smoke run wrote, with a compute-sanitizer that only runs what it is given."""
    folder = tmp_path_factory.mktemp("suite")
    program = folder / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER)
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"PATH": f"{program.parent}{os.pathsep}{environment['PATH']}", "RK_SUITE_COMMIT": "0123abcd"}
    command = [sys.executable, "-m", "benchmarks", "gpu-suite", "--smoke", "--out", str(folder / "out")]
    # The second slot has nothing that these have not, but for other sizes (gpu_suite/test_rehearsal.py runs all).
    for slot in (["--slot", "1"], ["--slot", "3", "--only", "sanitizer"]):
        done = subprocess.run([*command, *slot], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        logs = [path.read_text() for path in (folder / "out").glob("*/suite.log")]
        assert done.returncode == 0, done.stdout + done.stderr + "".join(logs)
        assert "all passed" in done.stdout
    return folder / "out"


@pytest.fixture
def slots(smoke_run) -> dict[int, dict]:
    return {slot: json.loads((smoke_run / f"slot-{slot}" / "results.json").read_text()) for slot in (1, 3)}


@pytest.fixture
def results(slots) -> dict:
    """Of slot 1."""
    return slots[1]


@pytest.mark.full
def test_every_stage_ran(slots):
    from benchmarks.gpu_suite.plan import SLOTS

    results = slots[1]
    assert {stage: told["status"] for stage, told in results["stages"].items()} == {
        stage.name: "passed" for stage in SLOTS[1]
    }
    assert results["commit_info"]["id"] == "0123abcd"
    assert {"torch", "transformers", "python"} <= set(results["versions"])
    assert results["machine_info"]["device"] == "cpu"
    assert [row["op"] for row in results["choices"]] == list(choosing.OPS)
    tests = results["tests"]["wrong or exact"]
    assert tests["passed"] == tests["collected"] >= 2
    assert set(slots[3]["sanitizer"]) == {"memcheck exact", "racecheck exact"}
    assert all(job["passed"] == 2 for job in slots[3]["sanitizer"].values()), "a few of many"


@pytest.mark.full
def test_every_kernel_is_checked_timed_and_related_to_its_roof(results):
    rows = [row["extra_info"] for row in results["benchmarks"]]
    for op in choosing.OPS:
        for direction in ("forward", "forward_backward"):
            found = {row["contender"] for row in rows if (row["op"], row["direction"]) == (op, direction)}
            assert {"reference", "eager"} <= found
    for row in rows:
        assert row["roof_fraction"] == pytest.approx(row["roof_s"] / row["median_s"])
        if row["same_work"]:
            assert row["error"] < 1e-4
    attention = {row["contender"] for row in rows if row["op"] == "attention" and row["direction"] == "forward"}
    assert {"sdpa", "sdpa flash", "sdpa math", "flex", "sdpa each"} <= attention


@pytest.mark.full
def test_peers_that_cannot_be_had_are_named(results):
    failed = {failure["contender"]: failure for failure in results["failures"]}
    assert {"sdpa cuDNN", "sdpa efficient", "varlen"} <= set(failed)
    assert all(failure["reason"] and not failure["broken"] for failure in failed.values())


@pytest.mark.full
def test_whole_models_are_checked_and_timed(results):
    from benchmarks.roofs import compute_roof

    found = {(row["direction"], row["batch"]["name"], row["contender"]) for row in results["models"]}
    for direction in ("forward", "forward_backward"):
        for batch in ("mixed3", "1x8"):
            for contender in ("ours, reference", "ours, zeros", "HF eager", "HF sdpa"):
                assert (direction, batch, contender) in found
    for row in results["models"]:
        assert row["within_promise"]
        assert row["error"] < 1e-4
        roof = compute_roof(results["roofs"], "float32")
        assert row["roof_fraction"] == pytest.approx(row["flops"] / row["median_s"] / roof)
        assert set(row.get("ratios", {})) == ({"HF eager", "HF sdpa"} if row["ours"] else set())


@pytest.mark.full
def test_the_report_holds_all_of_it(smoke_run):
    assert "## compute-sanitizer" in (smoke_run / "slot-3" / "results.md").read_text()
    smoke_run = smoke_run / "slot-1"
    report = (smoke_run / "results.md").read_text()
    for heading in ("## Stages", "## Tests", "## Whole models", "## Kernels", "## Choosing"):
        assert heading in report
    assert "HF sdpa" in report
    assert choosing.UNMEASURED in report
    images = [path.name for path in smoke_run.glob("*.png")]
    assert all(image in report for image in images)
    if __import__("importlib.util").util.find_spec("matplotlib"):
        assert images == ["roofline-cpu-float32.png"]
    assert len(list(smoke_run.iterdir())) <= 8, "what a borrowed machine hands back"


@pytest.mark.full
def test_the_kernel_results_compare_like_those_of_a_run(results):
    from benchmarks.compare import compare

    assert all(change.slowdown == pytest.approx(1.0) for change in compare(results, results))


# ---------------------------------------------------------------------------------------------- what can go wrong


@pytest.fixture
def suite(tmp_path):
    from benchmarks.gpu_suite import Suite

    said: list[str] = []

    def make(**options) -> Suite:
        arguments = argparse.Namespace(out=tmp_path / "out", smoke=True, limit=300.0, only=None)
        vars(arguments).update(options)
        made = Suite(arguments, 1, said.append)
        made.work = tmp_path
        made.said = said
        return made

    return make


def selection(monkeypatch, path: Path, name: str = "two"):
    """The suite's tests are those of one file."""
    from benchmarks.gpu_suite import Suite
    from benchmarks.gpu_suite.plan import Tests

    monkeypatch.setattr(Suite, "_smoke_tests", staticmethod(lambda *_: [Tests(name, (str(path),), "others")]))


def test_failing_tests_fail_the_suite_and_are_counted(suite, tmp_path, monkeypatch):
    from benchmarks.gpu_suite import Suite

    tests = tmp_path / "test_two.py"
    tests.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    selection(monkeypatch, tests)
    monkeypatch.setattr(Suite, "_models", lambda self, deadline: 1 / 0)
    made = suite(only=["tests", "models"])
    assert made.run() == 1
    written = json.loads((made.out / "results.json").read_text())
    told = written["tests"]["two"]
    assert (told["passed"], told["failed"], told["collected"]) == (1, 1, 2)
    assert "test_wrong" in told["failures"][0]
    assert written["stages"]["tests"]["status"] == "failed"
    assert written["stages"]["models"]["reason"] == "ZeroDivisionError: division by zero", "and yet it was tried"
    assert "FAILED: tests, models" in made.said[-1]


def test_a_test_run_that_dies_names_its_test(suite, tmp_path, monkeypatch):
    tests = tmp_path / "test_dies.py"
    tests.write_text("import os\ndef test_right(): pass\ndef test_dies(): os._exit(42)\n")
    selection(monkeypatch, tests, "dies")
    made = suite()
    status, _ = made._tests(time.time() + 600)
    assert status == "failed"
    assert made.results["tests"]["dies"]["passed"] == 1
    assert "test_dies: did not end (status 42)" in made.results["tests"]["dies"]["failures"][0]


@pytest.mark.parametrize("forced", [True, False])
def test_tests_of_a_variant_that_the_build_lacks_are_a_failure(suite, forced):
    """Whether it is set for the whole process, or the tests set it and are skipped."""
    from benchmarks.gpu_suite import plan

    if backends.cuda_variant("attention") is not None:
        pytest.skip("it is there")
    file = "tests/ops/test_variants.py" if not forced else "tests/ops/test_tolerance.py"
    made = suite()
    words = "attention and cuda-sm90" if not forced else None
    backend = "others" if forced else "cuda"
    tests = plan.Tests("lacking", (file,), backend, "attention", "sm90", forced=forced, expression=words)
    status, reason = made._run_tests([tests], time.time() + 600)
    assert status == "failed"
    assert "lacking failed: " in reason
    assert "not available" in reason


def test_what_takes_too_long_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    from benchmarks.gpu_suite import jobs as suite_jobs

    # Whoever is started in the background holds the pipe open for as long as it lives. The clock passes the deadline
    # when it has said that it runs: no speed of the machine matters.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    began = []

    def clock() -> float:
        with contextlib.suppress(BlockingIOError):
            began.extend([1.0] if os.read(reader, 100) else [])
        return sum(began)

    clocks = argparse.Namespace(time=clock, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(suite_jobs, "time", clocks)
    script = f"(echo runs; exec sleep 1000) > {pipe} & sleep 1000"
    jobs = [suite_jobs.Job(f"job{i}", ["sh", "-c", script], tmp_path / f"{i}.log") for i in range(2)]
    try:
        suite_jobs.run_jobs(jobs, parallel=1, deadline=0.5)
        assert [job.late for job in jobs] == [True, True]
        assert jobs[1].status is None, "it was never begun"
        patience = time.monotonic() + 60
        while time.monotonic() < patience:
            try:
                assert os.read(reader, 100) == b"", "the end: nobody holds it"
                return
            except BlockingIOError:  # somebody does
                time.sleep(0.05)
        pytest.fail("what the job had started still runs")
    finally:
        os.close(reader)


PART = """
import json, os, sys
order = json.load(open(sys.argv[1]))
stream = open(order["events"], "a")
def write(**event):
    stream.write(json.dumps(event) + "\\n"); stream.flush()
for case in ("op-a", "op-b", "op-c"):
    if case in order["done"]:
        continue
    for contender in ("cuda", "peer"):
        if [case, contender] in order["excluded"] or ["op-*", contender] in order["excluded"]:
            continue
        write(begin=[case, contender])
        if contender == "cuda" and case in {crashes}:
            {crash}
        write(row=dict(case=case, contender=contender))
    write(done=case)
write(finished=True)
"""


def run_part(made, tmp_path, monkeypatch, crashes: set[str], crash: str) -> tuple[str, str, list, list]:
    from benchmarks.gpu_suite import Suite

    script = tmp_path / "part.py"
    script.write_text(PART.replace("{crashes}", repr(crashes)).replace("{crash}", crash))
    real = Suite._child

    def child(self, *arguments, **more):
        job = real(self, *arguments, **more)
        job.command[1:3] = [str(script)]
        return job

    monkeypatch.setattr(Suite, "_child", child)
    made.results["roofs"] = {}
    rows = made.results["benchmarks"]
    status, reason = made._measured(
        "kernels", time.time() + 600, lambda e: rows.append({"extra_info": e["row"]}) if "row" in e else None, rows
    )
    return status, reason, [tuple(row["extra_info"].values()) for row in rows], made.results["failures"]


@pytest.mark.parametrize(
    ("crash", "says"),
    [
        ("os.abort()", "ended with status -6"),
        ("write(poisoned=[case, contender], reason='illegal address'); sys.exit(75)", "illegal address"),
    ],
)
def test_a_contender_that_takes_its_process_with_it_is_left_out(suite, tmp_path, monkeypatch, crash, says):
    status, reason, rows, failures = run_part(suite(), tmp_path, monkeypatch, {"op-b"}, crash)
    assert rows == [("op-a", "cuda"), ("op-a", "peer"), ("op-b", "peer"), ("op-c", "cuda"), ("op-c", "peer")]
    [failure] = failures
    assert (failure["case"], failure["contender"], failure["broken"]) == ("op-b", "cuda", True)
    assert says in failure["reason"]
    assert status == "failed", "it is one of ours"
    assert "cuda in op-b" in reason


def test_who_crashes_again_is_left_out_of_the_op(suite, tmp_path, monkeypatch):
    _, _, rows, failures = run_part(suite(), tmp_path, monkeypatch, {"op-a", "op-b", "op-c"}, "os.abort()")
    assert rows == [("op-a", "peer"), ("op-b", "peer"), ("op-c", "peer")]
    assert [failure["case"] for failure in failures] == ["op-a", "op-b"]


def test_who_says_nothing_is_taken_for_hung(suite, tmp_path, monkeypatch):
    from benchmarks import gpu_suite
    from benchmarks.gpu_suite import reading

    hangs = tmp_path / "hangs"

    def quiet(self) -> float:
        """A part that is slow to start is not quiet here, and one that hangs has been for long."""
        if not hangs.exists():
            return 0.0
        hangs.unlink()
        return 2 * gpu_suite._STALL

    monkeypatch.setattr(reading.Follower, "quiet", quiet)
    crash = f"open({str(hangs)!r}, 'w').close(); import time; time.sleep(1000)"
    _, _, rows, failures = run_part(suite(), tmp_path, monkeypatch, {"op-a"}, crash)
    assert len(rows) == 5
    assert "said nothing for too long" in failures[0]["reason"]


def test_a_follower_is_quiet_since_the_last_word(tmp_path, monkeypatch):
    from benchmarks.gpu_suite import reading

    now = 5.0
    monkeypatch.setattr(reading, "time", argparse.Namespace(monotonic=lambda: now))
    path = tmp_path / "events.jsonl"
    follower = reading.Follower(path)
    now = 12.0
    assert follower.events() == []
    assert follower.quiet() == 7.0
    path.write_text('{"done": "op-a"}\n{"begin')  # half a line is no word
    assert follower.events() == [{"done": "op-a"}]
    now = 13.0
    assert follower.events() == []
    assert follower.quiet() == 1.0


@pytest.fixture
def order(tmp_path):
    def make(**more) -> dict:
        return {
            "part": "kernels",
            "events": str(tmp_path / "events.jsonl"),
            "device": "cpu",
            "smoke": True,
            "slot": 1,
            "deadline": time.time() + 300,
            "roofs": {"copy": [{"bytes": 1, "bytes_per_s": 1e9}], "matmul": {"float32": 1e9}},
            **more,
        }

    return make


def events_of(order: dict) -> list[dict]:
    return [json.loads(line) for line in Path(order["events"]).read_text().splitlines()]


def test_a_part_that_meets_a_dead_gpu_says_with_whom(order, tmp_path, monkeypatch):
    from benchmarks import runner
    from benchmarks.gpu_suite import child

    def dead(device):
        raise runner.Poisoned("an illegal memory access")

    monkeypatch.setattr(runner, "check_gpu", dead)
    path = tmp_path / "order.json"
    path.write_text(json.dumps(order()))
    threads = torch.get_num_threads()
    try:
        assert child.main(str(path)) == child.POISONED
    finally:
        torch.set_num_threads(threads)
    last = events_of(order())[-1]
    # The first contender here that cannot be had on a CPU.
    assert last == {"poisoned": ["attention-quick-float32-forward-2x16", "sdpa cuDNN"], "reason": last["reason"]}


def test_a_part_out_of_time_says_what_it_left_out(order):
    from benchmarks.gpu_suite.child import Part

    part = Part(order(deadline=0.0))
    part.kernels()
    part.models()
    events = events_of(part.order)
    assert {event["failure"]["reason"] for event in events if "failure" in event} == {"no time left"}
    assert not any("row" in event or "model" in event for event in events)


def test_preparing_calls_everything_and_tells_nothing(order, monkeypatch):
    from benchmarks import workloads
    from benchmarks.gpu_suite.child import Part

    plan = workloads.suite_plan
    monkeypatch.setattr(workloads, "suite_plan", lambda *a, **k: plan(*a, **{**k, "ops": ("add_layer_norm",)}))
    part = Part(order())
    part.prepare()
    assert all(set(event) == {"begin"} for event in events_of(part.order))


def test_the_gpu_plan_is_complete():
    """What the issue asks for is in it, and the first cases are those that matter most."""
    from benchmarks.workloads import suite_models, suite_plan

    slots = [suite_plan("cuda", slot) for slot in (1, 2, 3)]
    cases = [case for slot in slots for case in slot]
    assert {(case.size.name, case.dtype_name) for case in slots[0]} == {("base", "bfloat16")}
    assert {case.op for case in slots[0]} == set(choosing.OPS)
    assert len({case.id for case in cases}) == len(cases)
    attention = [case for case in cases if case.op == "attention" and case.size.name == "base"]
    assert {max(case.batch.lengths) for case in attention if case.batch.even} == {64, 128, 256, 384, 512}
    assert all(abs(case.batch.tokens - 16384) <= 512 for case in attention if case.batch.even)
    assert any(min(case.batch.lengths) < 32 for case in attention)
    rows = {(case.op, case.size.hidden, case.batch.tokens) for case in cases}
    for hidden in (768, 1024):
        assert {("add_layer_norm", hidden, 128), ("add_layer_norm", hidden, 65536)} <= rows
    assert {("gelu_ffn", 768, 64), ("gelu_ffn", 768, 65536)} <= rows
    assert all(max(case.batch.lengths) <= 512 for case in cases)
    models = {(way, batch.name) for slot in (1, 2, 3) for way, batches in suite_models(slot) for batch in batches}
    names = {"1x32", "1x128", "8x128", "32x128", "32x512", "mixed8to512"}
    assert {name for way, name in models if way == "forward"} == names
    assert {name for way, name in models if way == "forward_backward"} == names - {"1x32"}
    assert (cases[0].dtype_name, cases[0].size.name) == ("bfloat16", "base")


class FakeGPU:
    """torch.cuda as the clock uses it: work takes 1 ms a call, and launching `launch` seconds."""

    def __init__(self, monkeypatch, launch: float, waits: bool = False) -> None:
        self.host = self.gpu = 0.0
        self.naps: list[float] = []
        self.launch, self.waits = launch, waits
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.gpu = max(fake.gpu, fake.host)

            def query(self) -> bool:
                return self.at <= fake.host

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        def nap(cycles: int) -> None:
            self.naps.append(cycles / 2e9)
            self.gpu = max(self.gpu, self.host) + cycles / 2e9

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", nap)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(self, "host", max(self.host, self.gpu)))
        monkeypatch.setattr(time, "perf_counter", lambda: self.host)

    def run(self) -> None:
        self.host += self.launch
        self.gpu = max(self.gpu, self.host) + 1e-3
        if self.waits:
            self.host = self.gpu


@pytest.mark.parametrize("launch", [1e-5, 9e-4, 2e-3])
def test_the_clock_times_kernels_and_not_launches(monkeypatch, launch):
    from benchmarks.timing import Clock

    gpu = FakeGPU(monkeypatch, launch)
    clock = Clock("cuda")
    for _ in range(3):
        assert clock.calls(gpu.run, 10) == [pytest.approx(1e-3)]
    seen = Clock("cuda", queued=False)
    assert seen.calls(gpu.run, 10) == [pytest.approx(max(1e-3, launch), rel=0.15)]


def test_the_clock_naps_for_nobody_who_waits_himself(monkeypatch):
    from benchmarks.timing import Clock

    gpu = FakeGPU(monkeypatch, 1e-4, waits=True)
    clock, run = Clock("cuda"), gpu.run
    for _ in range(5):
        assert clock.calls(run, 10) == [pytest.approx(1.1e-3, rel=0.1)]
    assert len(gpu.naps) == 2


@pytest.mark.parametrize("op", choosing.OPS)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_turns_go_round_sets_of_inputs_that_are_alike(op, direction):
    from benchmarks import contenders
    from benchmarks.ops import OPS
    from benchmarks.workloads import suite_plan

    case = next(c for c in suite_plan("cpu", 1, smoke=True, ops=[op]) if c.direction == direction)
    problem = OPS[op].problem(case)
    for name in ("reference", "eager"):
        contender = contenders.entries(case, wanted_backends=["reference"], compiled=False)[name].build(problem)
        assert contender.bytes(case.backward) >= sum(t.nbytes for t in contender.tensors)
        turn = contender.in_turn(case.backward, 3)
        with contender.active():
            first, *others = (turn() for _ in range(5))
        for other in others:
            pairs = zip(first, other, strict=True) if case.backward else [(first, other)]
            assert all(torch.equal(a, b) for a, b in pairs)


def test_variants_are_contenders_of_their_own(monkeypatch):
    from benchmarks import contenders
    from benchmarks.workloads import suite_plan

    monkeypatch.setattr(contenders, "backends_to_measure", lambda *_: ["cuda", "triton"])
    monkeypatch.setattr(backends, "cuda_variant", lambda op: "portable" if op in choosing.VARIANTS else None)
    for op, ours in (
        ("attention", ["cuda portable", "cuda sm90", "triton"]),
        ("gelu_ffn", ["cuda portable", "cuda sm80", "cuda sm90", "triton"]),
        ("add_layer_norm", ["cuda", "triton"]),
    ):
        case = suite_plan("cuda", 1, ops=[op])[0]
        found = contenders.entries(case, wanted_backends=(), compiled=False)
        assert [name for name, entry in found.items() if entry.ours] == ours
    assert found["cuda"].backend == "cuda"


# ------------------------------------------------------------------------------------------------------- choosing


def measured(**seconds: float) -> list[dict]:
    """Rows of attention at 64, 128 and 512 tokens, both directions; seconds: of a contender, or (at 64, 128, 512)."""
    rows = []
    for i, length in enumerate((64, 128, 512)):
        for direction in ("forward", "forward_backward"):
            for name, value in seconds.items():
                backend, _, variant = name.partition("_")
                rows.append(
                    {
                        "case": f"attention-base-bfloat16-{direction}-{length}",
                        "op": "attention",
                        "dtype": "bfloat16",
                        "direction": direction,
                        "batch": {"name": f"4x{length}", "lengths": [length] * 4},
                        "contender": name.replace("_", " "),
                        "ours": True,
                        "backend": backend,
                        "variant": variant or None,
                        "median_s": value[i] if isinstance(value, tuple) else value,
                    }
                )
    return rows


def proof(backend: str, op: str | None = None, variant: str | None = None, tool: str | None = None) -> dict:
    return {"backend": backend, "op": op, "variant": variant, "tool": tool, "verdict": "passed", "why": ""}


def results_of(rows: list[dict]) -> dict:
    kernels = [(op, variant) for op in choosing.OPS for variant in choosing.VARIANTS.get(op, (None,))]
    tests = {f"{op} {variant}": proof("cuda", op, variant) for op, variant in kernels}
    return {
        "roberta_kernels_schema": 1,
        "suite": True,
        "quick": False,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "machine_info": {"gpu": "a GPU", "gpu_capability": "9.0"},
        "tests": {**tests, "cuda": proof("cuda"), "triton": proof("triton"), "others": proof("others")},
        "sanitizer": {
            f"{tool} {op} {variant}": proof("cuda", op, variant, tool)
            for tool in ("memcheck", "racecheck")
            for op, variant in kernels
        },
        "benchmarks": [{"extra_info": row} for row in rows],
        "failures": [],
    }


def chosen(rows: list[dict], failures: list[dict] | None = None, change=lambda results: None) -> list[tuple]:
    from benchmarks.choose import entries, vetoes

    results = results_of(rows)
    results["failures"] = failures or []
    change(results)
    found = choosing.checked(entries(results, "results.json", vetoes(results)))
    assert all((e.arch_min, e.arch_max, e.commit) == (90, 90, "0123456789abcdef") for e in found)
    return [(e.size_min, e.size_max, e.backend, e.variant) for e in found]


def test_the_faster_is_chosen_by_size():
    rows = measured(cuda_portable=(1.0, 1.0, 3.0), cuda_sm90=(0.9, 0.8, 1.0), triton=(0.5, 1.0, 2.0))
    assert chosen(rows) == [(64, 90, "triton", None), (91, 512, "cuda", "sm90")]
    assert chosen(measured(cuda_portable=1.0, triton=2.0)) == [(64, 512, "cuda", "portable")]
    assert chosen(measured(cuda_portable=1.0, triton=1.01)) == [(64, 512, "triton", None)], "within the margin"


def test_what_gave_wrong_answers_is_not_chosen():
    rows = measured(cuda_portable=1.0, cuda_sm90=0.5, triton=2.0)
    wrong = [{"op": "attention", "contender": "cuda sm90", "case": "another", "broken": True, "reason": "wrong"}]
    assert chosen(rows, wrong) == [(64, 512, "cuda", "portable")]
    # Triton is out, and what is slower than it runs.
    slower = measured(cuda_portable=1.0, triton=0.5)
    assert chosen(slower, [{**wrong[0], "contender": "triton"}]) == [(64, 512, "cuda", "portable")]
    # A whole model: nobody knows which op it was.
    model = {"case": "model-bfloat16-forward-1x128", "broken": True, "reason": "wrong"}
    assert chosen(rows, [{**model, "contender": "ours, cuda sm90"}]) == [(64, 512, "cuda", "portable")]
    assert chosen(rows, [{**model, "contender": "ours, cuda portable"}]) == []
    assert chosen(rows, [{**model, "contender": "HF sdpa compile"}]) == [(64, 512, "cuda", "sm90")]


@pytest.mark.parametrize(
    ("key", "name", "what", "best"),
    [
        ("tests", "attention sm90", "failed", "portable"),
        ("tests", "attention portable", "failed", None),  # it runs what the others do not take
        ("tests", "cuda", "late", None),
        ("sanitizer", "racecheck attention sm90", "late", "portable"),
        ("sanitizer", "memcheck attention sm90", None, "portable"),
        ("sanitizer", "memcheck gelu_ffn sm90", "failed", "sm90"),
        ("tests", "triton", "late", "sm90"),
        ("tests", "triton", None, "sm90"),
    ],
)
def test_what_was_not_proved_is_not_chosen(key, name, what, best):
    rows = measured(cuda_portable=1.0, cuda_sm90=0.5, triton=2.0 if name != "triton" else 0.1)

    def change(results: dict) -> None:
        if what is None:
            del results[key][name]
        else:
            results[key][name]["verdict"] = what

    assert chosen(rows, change=change) == ([(64, 512, "cuda", best)] if best else [])


def test_only_what_was_measured_side_by_side_is_chosen():
    rows = measured(cuda_portable=1.0, triton=2.0)
    rows = [row for row in rows if not (row["backend"] == "triton" and "512" in row["case"])]
    assert chosen(rows) == [(64, 128, "cuda", "portable")]
    assert chosen(measured(cuda_portable=1.0)) == []
    # A variant that lacks a case cannot win by it.
    rows = measured(cuda_portable=1.0, cuda_sm90=0.1, triton=2.0)
    rows = [row for row in rows if not (row["variant"] == "sm90" and "forward_backward-512" in row["case"])]
    assert chosen(rows) == [(64, 512, "cuda", "portable")]


def test_choose_writes_the_table(tmp_path, monkeypatch):
    from benchmarks import choose as module

    folder = tmp_path / "results"
    folder.mkdir()
    path = folder / "results.json"
    path.write_text(json.dumps(results_of(measured(cuda_sm90=1.0, triton=2.0))))
    table = tmp_path / "choices.json"
    table.write_text(choosing.dumps(()))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for command in (["init", "-q"], ["add", "results"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    said: list[str] = []
    with pytest.raises(ValueError, match="not committed"):
        module.choose([path], said.append, table=table)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-qm", "results"], cwd=tmp_path, check=True)
    assert module.choose([path], said.append, table=table) == 0
    [entry] = choosing.load(table)
    assert (entry.backend, entry.variant, entry.results) == ("cuda", "sm90", "results/results.json")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="not committed"):
        module.choose([path], said.append, table=table)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(quick=True), "smoke"),
        (lambda r: r.pop("suite"), "not written by gpu-suite"),
        (lambda r: r["commit_info"].update(dirty=True), "changes"),
        (lambda r: r.update(machine_info=None), "does not say which GPU"),
    ],
)
def test_choose_refuses_results_that_prove_nothing(tmp_path, change, says):
    from benchmarks.choose import check

    results = copy.deepcopy(results_of([]))
    change(results)
    with pytest.raises(ValueError, match=says):
        check(results, tmp_path / "results.json")


def test_the_command_line_knows_the_suite(capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["gpu-suite", "--help"])
    assert ended.value.code == 0
    assert "--slot" in capsys.readouterr().out
