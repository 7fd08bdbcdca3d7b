"""The benchmarks run end to end, and their tools tell the truth. Nothing here asserts a speed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def command_line():
    """benchmarks.__main__.main; the benchmarks are no part of the package, and are imported from the repository."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.__main__ import main

        yield main
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    """The folder that a quick run wrote, with a C++ compiler that does not work."""
    folder = tmp_path_factory.mktemp("benchmarks")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [sys.executable, "-m", "benchmarks", "run", "--quick", "--device", "cpu", "--backend", "reference"]
    command += ["--op", "attention", "--op", "add_layer_norm", "--batch", "mixed8", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture
def results(quick_run) -> dict:
    return json.loads((quick_run / "kernels.json").read_text())


def _rows(results: dict) -> list[dict]:
    return [row["extra_info"] for row in results["benchmarks"]]


def test_json_says_what_was_measured_where(results):
    assert results["roberta_kernels_schema"] == 1
    assert results["quick"] is True
    assert results["commit_info"]["id"]
    assert {"torch", "python", "roberta_kernels"} <= set(results["versions"])
    assert {"device", "cpu", "cores", "threads", "isa_torch", "isa_kernels"} <= set(results["machine_info"])
    assert "node" not in results["machine_info"], "a result file names no host"
    assert results["roofs"]["matmul"]["float32"] > 0
    assert all(block["bytes_per_s"] > 0 for block in results["roofs"]["copy"])
    found = {(row["op"], row["direction"], row["contender"]) for row in _rows(results)}
    for direction in ("forward", "forward_backward"):
        for peer in ("reference", "eager", "sdpa", "sdpa each"):
            assert ("attention", direction, peer) in found
        for peer in ("reference", "eager", "layer_norm only"):
            assert ("add_layer_norm", direction, peer) in found


def test_every_row_has_its_time_work_and_roof(results):
    for row in _rows(results):
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["calls"] >= len(row["turn_medians_s"]) >= 3
        assert row["flops"] > 0
        assert row["bytes"] > 0
        assert row["roof_fraction"] == pytest.approx(row["roof_s"] / row["median_s"])
        assert row["useful_tokens"] == sum(row["batch"]["lengths"])
        if row["same_work"]:
            assert row["error"] < 1e-4
        if row["ours"]:
            peers = {r["contender"] for r in _rows(results) if r["case"] == row["case"] and not r["ours"]}
            assert set(row["ratios"]) == peers


def test_padded_peers_count_useful_tokens_and_say_what_they_compute(results):
    attention = {row["contender"]: row for row in _rows(results) if row["op"] == "attention"}
    lengths = attention["sdpa"]["batch"]["lengths"]
    assert attention["sdpa"]["computed_tokens"] == len(lengths) * max(lengths) > sum(lengths)
    assert attention["sdpa each"]["computed_tokens"] == attention["reference"]["computed_tokens"] == sum(lengths)
    assert len({row["flops"] for row in _rows(results) if row["case"] == attention["sdpa"]["case"]}) == 1


def test_pytest_benchmark_reports_the_times_that_were_measured(results):
    for row in results["benchmarks"]:
        assert row["stats"]["median"] == pytest.approx(row["extra_info"]["median_s"])
        assert row["stats"]["rounds"] == row["extra_info"]["calls"]


def test_a_peer_that_does_not_compile_is_a_row_that_says_so(results, quick_run):
    failed = [failure for failure in results["failures"] if failure["contender"] == "compile"]
    assert {failure["op"] for failure in failed} == {"add_layer_norm"}
    assert all(failure["reason"] for failure in failed)
    report = (quick_run / "kernels.md").read_text()
    assert "vs compile" in report
    assert "| failed |" in report
    assert "No figure for compile" in report


def test_tables_and_plots_are_written(quick_run, results):
    report = (quick_run / "kernels.md").read_text()
    assert "add_layer_norm, forward + backward" in report
    assert results["machine_info"]["cpu"] in report
    images = sorted(path.name for path in quick_run.glob("*.png"))
    assert images == [
        "ratios-reference-forward.png",
        "ratios-reference-forward_backward.png",
        "roofline-cpu-float32.png",
    ]
    assert all(image in report for image in images)
    assert all((quick_run / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_report_goes_into_a_document_at_its_markers(quick_run, tmp_path, command_line):
    document = tmp_path / "page.md"
    document.write_text("before\n\n<!-- results:cpu -->\nold\n<!-- /results:cpu -->\n\nafter\n")
    arguments = ["report", str(quick_run / "kernels.json"), "--into", str(document)]
    assert command_line(arguments) == 0
    once = document.read_text()
    assert "(images/ratios-reference-forward.png)" in once
    assert (tmp_path / "images" / "ratios-reference-forward.png").is_file()
    assert "#### attention, forward" in once
    assert "old" not in once.split()
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert command_line(arguments) == 0
    assert document.read_text() == once
    document.write_text("no markers")
    assert command_line(arguments) == 2


def _scaled(results: dict, factor: float, *, peers_too: bool = False) -> dict:
    """The results with the add_layer_norm kernels' times (and their peers') multiplied."""
    scaled = copy.deepcopy(results)
    for row in _rows(scaled):
        if row["op"] == "add_layer_norm" and (row["ours"] or peers_too):
            for figure in ("median_s", "p20_s", "p80_s"):
                row[figure] *= factor
    return scaled


def _steady(results: dict) -> dict:
    """The results without their spread, which on a busy machine covers a factor of two."""
    steady = copy.deepcopy(results)
    for row in _rows(steady):
        row["p20_s"] = row["p80_s"] = row["median_s"]
    return steady


@pytest.fixture
def compare(tmp_path, command_line, capfd):
    def run(old: dict, new: dict) -> tuple[int, str]:
        paths = tmp_path / "old.json", tmp_path / "new.json"
        for path, content in zip(paths, (old, new), strict=True):
            path.write_text(json.dumps(content))
        status = command_line(["compare", *map(str, paths)])
        return status, capfd.readouterr().err

    return run


def test_compare_finds_a_planted_regression(results, compare):
    old = _steady(results)
    assert compare(old, old)[0] == 0
    status, told = compare(old, _scaled(old, 2.0))
    assert status == 3
    slower = [line for line in told.splitlines() if line.startswith("SLOWER")]
    assert len(slower) == 2
    assert all("add_layer_norm" in line and "2.00 times" in line for line in slower)
    status, told = compare(old, _scaled(old, 0.5))
    assert status == 0
    assert told.count("faster add_layer_norm") == 2


def test_compare_takes_a_slower_machine_for_what_it_is(results, compare):
    assert compare(_steady(results), _scaled(_steady(results), 2.0, peers_too=True))[0] == 0


def test_compare_calls_nothing_a_regression_that_the_spread_covers(results, compare):
    old = _steady(results)
    for row in _rows(old):
        row["p20_s"], row["p80_s"] = row["median_s"] / 3, row["median_s"] * 3
    assert compare(old, _scaled(old, 2.0))[0] == 0


def test_compare_refuses_another_machine(results, compare):
    other = copy.deepcopy(results)
    other["machine_info"]["cpu"] = "Another CPU"
    status, told = compare(results, other)
    assert status == 4
    assert "Another CPU" in told


def test_run_refuses_another_machine_before_it_measures(results, tmp_path, command_line):
    other = copy.deepcopy(results)
    other["machine_info"]["cpu"] = "Another CPU"
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    out = tmp_path / "results"
    threads = torch.get_num_threads()
    try:  # a quick run sets them
        assert command_line(["run", "--quick", "--device", "cpu", "--compare", str(path), "--out", str(out)]) == 4
    finally:
        torch.set_num_threads(threads)
    assert not out.exists()


@pytest.fixture
def case(command_line):
    from benchmarks.workloads import plan

    [case] = plan("cpu", quick=True, ops=["add_layer_norm"], batches=["mixed8"], directions=["forward"])
    return case


def test_wrong_answers_get_no_time(case):
    import dataclasses

    from benchmarks.contenders import entries
    from benchmarks.problem import Contender, Problem
    from benchmarks.runner import run_case
    from benchmarks.timing import QUICK, Clock

    def slightly_wrong(problem: Problem) -> Contender:
        right = found["reference"].build(problem)
        return dataclasses.replace(right, function=lambda *arguments: right.function(*arguments) * 1.0001)

    found = entries(case, wanted_backends=["reference"], compiled=False)
    found["wrong"] = dataclasses.replace(found["reference"], build=slightly_wrong)
    roofs = {"copy": [{"bytes": 1, "bytes_per_s": 1e9}], "matmul": {"float32": 1e9}}
    results = run_case(case, found, roofs, Clock("cpu"), QUICK)
    assert results["wrong"].samples is None
    assert results["wrong"].broken
    assert "wrong answers" in results["wrong"].reason
    assert results["reference"].samples.calls
    assert results["eager"].samples.calls


def test_contenders_take_turns(command_line):
    import contextlib

    from benchmarks.timing import Call, Clock, Effort, measure

    took: list[str] = []
    calls = {name: Call(lambda name=name: took.append(name), contextlib.nullcontext) for name in "abc"}
    effort = Effort(turns=4, min_turns=4, turn_seconds=0.0, max_calls=1, rest=0.0, budget=1.0)
    samples = measure(calls, Clock("cpu"), effort)
    assert "".join(took) == "aabbcc" + "abc" + "cba" + "abc" + "cba"  # two calls each to see how long one takes
    assert all(len(s.turns) == 4 for s in samples.values())
