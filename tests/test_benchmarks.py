"""The benchmarks run end to end, and their tools tell the truth. Nothing here asserts a speed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import forks
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
def test_padded_peers_count_useful_tokens_and_say_what_they_compute(results):
    attention = {row["contender"]: row for row in _rows(results) if row["op"] == "attention"}
    lengths = attention["sdpa"]["batch"]["lengths"]
    assert attention["sdpa"]["computed_tokens"] == len(lengths) * max(lengths) > sum(lengths)
    assert attention["sdpa each"]["computed_tokens"] == attention["reference"]["computed_tokens"] == sum(lengths)
    assert len({row["flops"] for row in _rows(results) if row["case"] == attention["sdpa"]["case"]}) == 1


@pytest.mark.full
def test_pytest_benchmark_reports_the_times_that_were_measured(results):
    for row in results["benchmarks"]:
        assert row["stats"]["median"] == pytest.approx(row["extra_info"]["median_s"])
        assert row["stats"]["rounds"] == row["extra_info"]["calls"]


@pytest.mark.full
def test_a_peer_that_does_not_compile_is_a_row_that_says_so(results, quick_run):
    failed = [failure for failure in results["failures"] if failure["contender"] == "compile"]
    assert {failure["op"] for failure in failed} == {"add_layer_norm"}
    assert all(failure["reason"] for failure in failed)
    report = (quick_run / "kernels.md").read_text()
    assert "vs compile" in report
    assert "| failed |" in report
    assert "No figure for compile" in report


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
def test_compare_takes_a_slower_machine_for_what_it_is(results, compare):
    assert compare(_steady(results), _scaled(_steady(results), 2.0, peers_too=True))[0] == 0


@pytest.mark.full
def test_compare_calls_nothing_a_regression_that_the_spread_covers(results, compare):
    old = _steady(results)
    for row in _rows(old):
        row["p20_s"], row["p80_s"] = row["median_s"] / 3, row["median_s"] * 3
    assert compare(old, _scaled(old, 2.0))[0] == 0


@pytest.mark.full
def test_compare_refuses_another_machine(results, compare):
    other = copy.deepcopy(results)
    other["machine_info"]["cpu"] = "Another CPU"
    status, told = compare(results, other)
    assert status == 4
    assert "Another CPU" in told


@pytest.mark.full
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


# -- whole models on a CPU --------------------------------------------------------------------------------------------


def _model_row(
    workload: str, contender: str, seconds: float, *, error: float = 1e-7, weights: str | None = None
) -> dict:
    return {
        "case": f"model-float32-forward-{workload}",
        "model": "roberta-base",
        "batch": {"name": workload, "lengths": [8, 4]},
        "direction": "forward",
        "contender": contender,
        "ours": contender.startswith("ours"),
        "weights": weights,
        "note": "a note",
        "median_s": seconds,
        "p20_s": seconds * 0.99,
        "p80_s": seconds * 1.01,
        "turn_medians_s": [seconds] * 4,
        "calls": 4,
        "flops": 10**9,
        "flops_per_s": 1e9 / seconds,
        "bytes": 10**8,
        "useful_tokens": 12,
        "useful_tokens_per_s": 12 / seconds,
        "roof_fraction": 1e-2 / seconds,
        "memory_fraction": 1e-3 / seconds,
        "error": error,
        "within_promise": None if weights else True,
    }


def _model_results(rows: list[dict]) -> dict:
    return {
        "roberta_kernels_schema": 1,
        "whole_models": True,
        "quick": False,
        "datetime": "2026-01-01T00:00:00+00:00",
        "commit_info": {"id": "0123456789abcdef"},
        "machine_info": {
            "device": "cpu",
            "cpu": "A CPU",
            "cores": 2,
            "threads": 2,
            "isa_kernels": "avx2",
            "isa_torch": "AVX2",
        },
        "versions": {"torch": "2"},
        "roofs": {"copy": [{"bytes": 1, "bytes_per_s": 1e10}], "matmul": {"float32": 1e11}, "fma": 2e11},
        "unavailable": {"OpenVINO": "not installed: openvino"},
        "benchmarks": [],
        "models": rows,
        "scaling": [],
        "memory": [{"contender": "ours", "batch": "1x4", "peak_bytes": 700 << 20, "base_bytes": 300 << 20}],
        "failures": [],
    }


def test_targets_say_what_was_reached_and_what_was_missed(command_line):
    from benchmarks.model_report import outcomes, targets

    rows = [
        *(_model_row("1x4", name, time) for name, time in (("ours", 0.1), ("HF sdpa", 0.3), ("ONNX Runtime", 0.2))),
        _model_row("1x4", "ONNX Runtime int8", 0.05, error=0.03, weights="int8"),  # no float32 peer
        _model_row("1x4", "ours int8", 0.06, error=0.02, weights="int8"),
        _model_row("1x4", "ours int8-dynamic", 0.04, error=0.02, weights="int8"),
        *(_model_row("8x128", name, time) for name, time in (("ours", 0.012), ("HF sdpa", 0.018))),
        *(_model_row("4x512", name, time) for name, time in (("ours", 0.5), ("HF sdpa", 0.6))),
    ]
    results = _model_results(rows)
    found = {(o.target.workload, o.target.ours[0]): o for o in outcomes(results)}
    assert found["1x4", "ours"].other["contender"] == "ONNX Runtime"
    assert found["1x4", "ours"].missed == ()
    assert found["1x4", "ours bfloat16"].missed is None
    assert found["1x4", "ours int8"].row["contender"] == "ours int8-dynamic"
    assert found["1x4", "ours int8"].missed == ("error",)
    assert found["8x128", "ours"].missed == ("roof",)
    assert found["4x512", "ours"].missed == ("time",)
    assert ("1x16", "ours") not in found
    lines = targets(results).splitlines()
    assert "| 1x4 | ours | ONNX Runtime | 1.7 x | 2.00 x (2.00 to 2.00) | reached |" in lines
    assert "| 1x4 | ours bfloat16 | ours | 1.5 x | not measured |  |" in lines
    assert "| 4x512 | ours | HF sdpa | 1.3 x | **1.20 x (1.20 to 1.20)** | **missed** |" in lines
    assert any("1.50 x (1.50 to 1.50), **83% of the roof** | **missed**" in line for line in lines)
    assert any("1.25 x (1.25 to 1.25), **error 0.67 of it** | **missed**" in line for line in lines)


def test_targets_on_tiles_take_the_fastest_of_several_others(command_line):
    from benchmarks.model_report import outcomes, replaced, targets

    rows = [
        _model_row("8x128", "ours", 0.4),
        _model_row("8x128", "ours high", 0.2, error=1e-6, weights="bfloat16"),
        _model_row("8x128", "OpenVINO bfloat16", 0.3, error=1e-2, weights="bfloat16"),
        _model_row("8x128", "ours, bfloat16 model", 0.1, weights="bfloat16"),
        _model_row("8x128", "HF bfloat16 model", 0.2, weights="bfloat16"),
        _model_row("8x128", "ours int8-dynamic", 0.1, error=0.01, weights="int8"),
        _model_row("8x128", "ONNX Runtime int8", 0.35, error=0.03, weights="int8"),
    ]
    rows[3]["instead_of"] = "HF bfloat16 model"
    results = _model_results(rows)
    results["machine_info"]["isa_kernels"] = "amx"
    found = {(o.target.ours[0], o.target.other): o for o in outcomes(results)}
    assert found["ours", ("OpenVINO bfloat16",)].missed == ("time",)
    assert found["ours", None].missed is None  # no peer in float32 was measured
    assert found["ours high", ("OpenVINO bfloat16",)].missed == ("time",)
    half = found["ours, bfloat16 model", ("HF bfloat16 model", "OpenVINO bfloat16")]
    assert half.other["contender"] == "HF bfloat16 model"
    assert half.missed == ("time", "roof")
    int8 = found["ours int8-dynamic", ("ONNX Runtime int8", "OpenVINO bfloat16")]
    assert int8.other["contender"] == "OpenVINO bfloat16"
    assert int8.missed == ()
    assert int8.error == pytest.approx(1 / 3)
    assert "| 2.5 x, error below 0.5 of ONNX Runtime int8's | 3.00 x (3.00 to 3.00), error 0.33 of it |" in targets(
        results
    )
    assert replaced(results).splitlines() == [
        "| workload | ours, bfloat16 model, against HF bfloat16 model |",
        "|---|---|",
        "| 8x128 | 2.00 x (2.00 to 2.00) |",
    ]


def test_of_several_of_ours_the_fastest_that_reaches_a_target_counts():
    from benchmarks.model_report import outcomes

    rows = [
        _model_row("1x4", "ONNX Runtime int8", 0.05, error=0.03, weights="int8"),
        _model_row("1x4", "ours int8", 0.04, error=0.01, weights="int8"),
        _model_row("1x4", "ours int8-dynamic", 0.02, error=0.02, weights="int8"),
    ]
    found = next(o for o in outcomes(_model_results(rows)) if o.target.ours[0] == "ours int8")
    assert found.row["contender"] == "ours int8"
    assert found.missed == ()
    rows[1] = _model_row("1x4", "ours int8", 0.06, error=0.01, weights="int8")
    found = next(o for o in outcomes(_model_results(rows)) if o.target.ours[0] == "ours int8")
    assert found.row["contender"] == "ours int8-dynamic"
    assert found.missed == ("error",)


def test_report_of_models_says_what_is_missing_and_goes_into_documents(tmp_path, command_line):
    rows = [_model_row("1x4", "ours", 0.1), _model_row("1x4", "HF sdpa", 0.3)]
    rows[0]["ratios"] = {"HF sdpa": {"median": 3.0, "p20": 2.9, "p80": 3.1}}
    path = tmp_path / "models.json"
    path.write_text(json.dumps(_model_results(rows)))
    assert command_line(["report", str(path)]) == 0
    report = (tmp_path / "models.md").read_text()
    assert "OpenVINO was not measured: not installed: openvino" in report
    assert "| 1x4 (12 real tokens of 16) | 100 | 300 |" in report
    assert "| 1x4 | ours | 3.00 (2.90 to 3.10) |" in report
    assert "| 10% | 1% | 1e-07 | 700 (300) |" in report
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- results:cpu-models -->\nold\n<!-- /results:cpu-models -->\nafter\n")
    assert command_line(["report", str(path), "--into", str(document)]) == 0
    assert "(images/models-cpu-speed.png)" in document.read_text()
    assert (tmp_path / "images" / "models-cpu-speed.png").read_bytes().startswith(b"\x89PNG")


def test_compare_knows_whole_models(compare):
    rows = [_model_row("1x4", "ours", 0.1), _model_row("1x4", "HF sdpa", 0.3)]
    old = _model_results(rows)
    new = copy.deepcopy(old)
    for figure in ("median_s", "p20_s", "p80_s"):
        new["models"][0][figure] *= 1.5
    status, told = compare(old, new)
    assert status == 3
    assert "SLOWER model-float32-forward-1x4 ours" in told
    assert compare(new, old)[0] == 0


def test_what_cannot_be_had_is_named_and_never_stood_in_for(command_line, monkeypatch):
    import importlib.util

    from benchmarks import cpu_suite
    from benchmarks.engines import ENGINES

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert all("not installed" in engine.missing() for engine in ENGINES.values())
    monkeypatch.setattr(cpu_suite, "patch", lambda model, *, padded_rows="exact", backend="auto": None)
    found = cpu_suite.contenders(None, 1, smoke=True)
    for name in cpu_suite.QUANTIZED:
        assert found[f"ours {name}"].missing == "patch() has no option quantization"

    def refuses(model, *, quantization):
        raise ValueError(f"no {quantization} here")

    monkeypatch.setattr(cpu_suite, "patch", refuses)
    found = cpu_suite.contenders(None, 1, smoke=True)
    assert found["ours int8-dynamic"].missing == "no int8-dynamic here"
    assert not found["ours"].missing


def test_only_takes_known_names(command_line, tmp_path, capfd):
    threads = torch.get_num_threads()
    try:
        assert command_line(["models", "--smoke", "--only", "2x2", "--out", str(tmp_path)]) == 2
    finally:
        torch.set_num_threads(threads)
    told = " ".join(capfd.readouterr().err.split())
    assert "does not know 2x2" in told
    assert "corpus" in told


def test_smoke_results_are_not_for_the_documents(command_line):
    from rich.console import Console

    from benchmarks import __main__ as command

    before = command.DOCUMENT.read_text(), command.README.read_text()
    with pytest.raises(ValueError, match="not for the documents"):
        command._fill_documents({"quick": True}, Console())
    assert (command.DOCUMENT.read_text(), command.README.read_text()) == before
    for text in before:
        for kind in ("cpu", "cpu-amx"):
            assert text.count(f"<!-- results:{kind}-models -->") == text.count(f"<!-- /results:{kind}-models -->") == 1


def test_peers_of_the_corpus_answer_in_the_order_of_the_texts(command_line):
    from types import SimpleNamespace

    from benchmarks.corpus import sorted_by_length
    from roberta_kernels.demo.corpus import train_tokenizer

    texts = [" ".join(["word"] * (1 + 7 * i % 50)) for i in range(70)]
    tokenizer = train_tokenizer(texts, 300)
    shapes = []

    def run(input_ids, attention_mask):
        shapes.append(tuple(input_ids.shape))
        assert torch.equal(attention_mask.bool(), input_ids != tokenizer.pad_token_id)
        return SimpleNamespace(last_hidden_state=input_ids[..., None].double())

    found = sorted_by_length(run, tokenizer, texts, 40)
    ids = tokenizer(texts, truncation=True, max_length=40)["input_ids"]
    assert found[:, 0].tolist() == pytest.approx([sum(row) / len(row) for row in ids])
    assert sum(shape[0] for shape in shapes) == len(texts)
    assert all(count * longest <= 512 for count, longest in shapes)
    assert [shape[1] for shape in shapes] == sorted(shape[1] for shape in shapes)
    assert len(shapes) <= 2 + sum(count * longest for count, longest in shapes) // 400


def test_scaling_varies_one_thing_at_a_time(command_line):
    from benchmarks.workloads import scaling_plan

    plan = scaling_plan(6)
    assert [x for x, _ in plan["threads"]] == [1, 2, 4, 6]
    assert [x for x, _ in scaling_plan(1)["threads"]] == [1]
    for padding, batch in plan["padding"]:
        assert batch.padded_tokens == 512
        assert batch.tokens == round(512 * (1 - padding))
    assert all(batch.tokens == x for x, batch in plan["tokens"])


def test_multiply_add_roof_is_above_no_product(command_line, monkeypatch):
    from benchmarks import roofs

    assert roofs.compute_roof({"matmul": {"float32": 2.0}, "fma": 3.0}, "float32") == 3.0
    assert roofs.compute_roof({"matmul": {"float32": 2.0}, "fma": None}, "float32") == 2.0
    assert roofs.compute_roof({"matmul": {"float32": 2.0, "bfloat16": 9.0}, "fma": 3.0}, "bfloat16") == 9.0
    tiles = {"matmul": {"float32": 2.0}, "fma": 3.0, "units": {"bfloat16": 30.0, "int8": 60.0}}
    kinds = ("float32", "three parts", "bfloat16", "int8")
    assert [roofs.compute_roof(tiles, kind) for kind in kinds] == [5.0, 10.0, 30.0, 60.0]
    assert roofs.compute_roof({"matmul": {"float32": 2.0}, "fma": 3.0}, "int8") == 0.0  # not known
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert roofs._units(1, 0.001) == {}


def test_units_are_measured_where_there_is_a_compiler(command_line):
    from benchmarks import roofs

    rates = roofs._units(1, 0.02)
    if not rates:
        pytest.skip("needs a C++ compiler that builds for this machine")
    assert set(rates) == {"float32", "bfloat16", "int8"}
    # A hundredth of what any core does: sums that have decayed to denormal numbers take that long.
    assert rates["float32"] > 1e9
    assert all(rate is None or rate > 1e9 for rate in rates.values())


def _models(folder: Path, *only: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = ["-m", "benchmarks", "models", "--smoke", "--out", folder]
    command += [argument for name in only for argument in ("--only", name)]
    done = forks.python(*command, environment=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads((folder / "models.json").read_text())


@pytest.mark.full
def test_models_are_checked_timed_and_related(tmp_path):
    results = _models(tmp_path, "1x8", "memory", "ours", "HF sdpa")
    assert results["quick"]
    assert not results["failures"]
    assert results["commit_info"]["id"]
    rows = {row["contender"]: row for row in results["models"]}
    assert list(rows) == ["ours", "HF sdpa"]
    for row in rows.values():
        assert row["within_promise"]
        assert 0 < row["error"] < 1e-5
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["roof_fraction"] > 0
        assert row["memory_fraction"] > 0
    assert set(rows["ours"]["ratios"]) == {"HF sdpa"}
    if sys.platform == "linux":
        memory = {row["contender"]: row for row in results["memory"]}
        assert set(memory) == {"ours", "HF sdpa"}
        assert all(row["peak_bytes"] >= row["base_bytes"] > 0 for row in memory.values())
    assert list(tmp_path.glob("models-cpu*-speed.png"))
    assert "| 1x8 | ours |" in (tmp_path / "models.md").read_text()


@pytest.mark.full
def test_every_peer_that_is_installed_is_measured(tmp_path, command_line):
    from benchmarks import model_report
    from benchmarks.engines import ENGINES

    results = _models(tmp_path, "mixed3", "1x8", "corpus", "training", "scaling")  # memory: a process for each
    absent = {name: engine.missing() for name, engine in ENGINES.items() if engine.missing()}
    assert {name: results["unavailable"][name] for name in absent} == absent
    assert not results["failures"]
    errors = {(row["contender"], row["batch"]["name"]): row["error"] for row in results["models"]}
    here = ["ours", "HF eager", "HF sdpa", *(name for name in ENGINES if name not in absent)]
    for name in here:
        for batch in ("mixed3", "1x8"):
            assert errors[name, batch] < (1e-1 if ENGINES.get(name) and ENGINES[name].weights else 1e-5)
    compared = [name for name in ("ours", "HF sdpa", "ONNX Runtime") if name not in absent]
    assert all(errors[name, "corpus"] < 1e-5 for name in compared)
    assert {(row["series"], row["contender"]) for row in results["scaling"]} == {
        (series, name) for series in ("tokens", "padding", "threads") for name in compared
    }
    images = {path.name for path in tmp_path.glob("*.png")}
    kind = model_report.kind(results)
    assert images == {f"models-{kind}-{what}.png" for what in ("speed", "roofline", "scaling")}
    if absent:
        pytest.skip("; ".join(f"{name} is {why}" for name, why in absent.items()))
