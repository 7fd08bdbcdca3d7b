"""All slots of the GPU suite, from the build to the choosing table, on a machine that is none (double.py): what goes
wrong there goes wrong here, in seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from roberta_kernels.backends import choosing

from .double import Rehearsal, make_machine

pytestmark = pytest.mark.full  # minutes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a machine, which this process takes for its own."""
    for name, value in make_machine(tmp_path / "machine").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "machine"


def behave(machine: Path, **behaviour: Any) -> None:
    (machine / "behaviour.json").write_text(json.dumps(behaviour))


def read(folder: Path, slot: int) -> dict[str, Any]:
    return json.loads((folder / f"slot-{slot}" / "results.json").read_text())


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {name: told["status"] for name, told in results["stages"].items()}


def choose(folder: Path, monkeypatch: pytest.MonkeyPatch, slots: tuple[int, ...] = (1, 2, 3)) -> tuple[dict, str]:
    """({(op, backend, variant): sizes} of the table that these slots make, what was said)."""
    from benchmarks import choose as module

    monkeypatch.setattr(module, "ROOT", folder)
    monkeypatch.setattr(module, "committed", lambda path: True)
    table = folder / "choices.json"
    table.write_text(choosing.dumps(()))
    said: list[str] = []
    module.choose([folder / f"slot-{slot}" / "results.json" for slot in slots], said.append, table=table)
    entries = choosing.load(table)
    return {(e.op, e.backend, e.variant): (e.size_min, e.size_max) for e in entries}, "\n".join(said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with all slots of a run in which nothing went wrong, and the machine that it was on."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patching:
        for name, value in make_machine(folder / "machine").items():
            patching.setenv(name, value)
        for slot in (1, 2, 3):
            suite = Rehearsal(folder, slot)
            assert suite.run() == 0, "\n".join(suite.said)
    return folder


def copied(whole: Path, folder: Path, *slots: int) -> None:
    for slot in slots:
        (folder / f"slot-{slot}").mkdir()
        shutil.copyfile(whole / f"slot-{slot}/results.json", folder / f"slot-{slot}/results.json")


def test_all_slots_and_the_table_that_they_make(whole: Path, monkeypatch) -> None:
    for slot in (1, 2, 3):
        results = read(whole, slot)
        assert set(statuses(results).values()) == {"passed"}
        assert results["stages"]["build"]["reason"] == "prebuilt"
        assert results["card"]["capability"] == "9.0"
        report = (whole / f"slot-{slot}" / "results.md").read_text()
        assert f"slot {slot}: NVIDIA H100" in report
    assert (whole / "machine/package/_cuda.so").read_text() == "prebuilt"
    assert "9.0a" in (whole / "machine/package/build_report.json").read_text()

    first, third = read(whole, 1), read(whole, 3)
    for op, known in choosing.VARIANTS.items():
        for variant in known:
            assert first["tests"][f"{op} {variant}"]["served"] == {f"{op} {variant} forward": 2}
            assert first["tests"][f"{op} cuda {variant}"]["passed"] == 4, "two processes share them"
            for tool in ("memcheck", "racecheck"):
                assert third["sanitizer"][f"{tool} {op} {variant}"]["verdict"] == "passed"
    assert third["tests"]["triton"]["passed"] == 48
    assert {row["case"].split("-")[2] for row in first["models"]} == {"forward"}

    table, _ = choose(whole, monkeypatch)
    assert set(table) == {
        ("attention", "cuda", "sm90"),
        ("gelu_ffn", "cuda", "sm90"),
        ("add_layer_norm", "triton", None),
    }


def test_a_missing_variant_is_a_failure_and_is_not_chosen(machine: Path, tmp_path: Path, monkeypatch) -> None:
    behave(machine, lacks=["gelu_ffn sm90"])
    for slot in (1, 3):
        assert Rehearsal(tmp_path, slot).run() == 1
    first = read(tmp_path, 1)
    assert {stage for stage, status in statuses(first).items() if status == "failed"} == {"variants", "tests"}
    assert "gelu_ffn sm90 failed: no test ran: Skipped: gelu_ffn sm90" in first["stages"]["variants"]["reason"]
    assert first["tests"]["gelu_ffn cuda sm90"]["why"] == "gelu_ffn sm90 is not in this build"
    assert statuses(read(tmp_path, 3))["sanitizer"] == "failed"
    table, said = choose(tmp_path, monkeypatch, (1, 3))
    assert ("gelu_ffn", "cuda", "sm80") in table
    assert ("attention", "cuda", "sm90") in table, "another op's variant is no worse for it"
    assert "not chosen: gelu_ffn, cuda (sm90)" in said


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_missing_backend_is_a_failure(machine: Path, tmp_path: Path, backend: str) -> None:
    behave(machine, backends=[backend])
    suite = Rehearsal(tmp_path, 1, only=["build", "machine"])
    assert suite.run() == 1
    assert suite.results["stages"]["machine"] == {
        "status": "failed",
        "reason": f"backend {backend} is missing: said so",
        "seconds": suite.results["stages"]["machine"]["seconds"],
    }


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_triton_late_or_failed_is_out_and_nobody_else(
    whole: Path, machine: Path, tmp_path: Path, monkeypatch, how: str
) -> None:
    copied(whole, tmp_path, 1)
    behave(machine, **{how: "triton"})
    real = Rehearsal._deadline
    soon = {"hangs": 1.0, "fails": 600.0}[how]
    monkeypatch.setattr(
        Rehearsal, "_deadline", lambda s, stage: time.time() + soon if stage.name == "triton" else real(s, stage)
    )
    assert Rehearsal(tmp_path, 3).run() == 1
    results = read(tmp_path, 3)
    assert {stage for stage, status in statuses(results).items() if status == "failed"} == {"triton"}
    assert results["tests"]["triton"]["verdict"] == {"hangs": "late", "fails": "failed"}[how]
    table, said = choose(tmp_path, monkeypatch, (1, 3))
    assert {key[1] for key in table} == {"cuda"}
    assert ("add_layer_norm", "cuda", None) in table, "Triton was faster there, and proved nothing"
    assert "not chosen: add_layer_norm, triton" in said


def test_a_failure_of_the_whole_cuda_backend_leaves_triton(
    whole: Path, machine: Path, tmp_path: Path, monkeypatch
) -> None:
    behave(machine, fails="cuda")
    assert Rehearsal(tmp_path, 1).run() == 1
    copied(whole, tmp_path, 3)
    with pytest.raises(ValueError, match="no op was measured"):
        choose(tmp_path, monkeypatch, (1, 3))


def test_what_all_backends_stand_on_has_to_pass(machine: Path, tmp_path: Path, monkeypatch) -> None:
    behave(machine, fails="others")
    assert Rehearsal(tmp_path, 1, only=["build", "machine", "tests"]).run() == 1
    with pytest.raises(ValueError, match="what all backends have in common"):
        choose(tmp_path, monkeypatch, (1,))


def test_a_sanitizer_that_sees_nothing_proves_nothing(machine: Path, tmp_path: Path) -> None:
    (machine / "bin/blind").touch()
    suite = Rehearsal(tmp_path, 3, only=["build", "machine", "sanitizer"])
    assert suite.run() == 1
    assert "no fault found in a faulty kernel" in suite.results["stages"]["sanitizer"]["reason"]
    assert suite.results["sanitizer"] == {}


def test_a_bundle_of_other_sources_is_not_taken(machine: Path, tmp_path: Path) -> None:
    path = machine / "bundle/bundle.json"
    path.write_text(path.read_text().replace('"sources": "', '"sources": "0'))
    suite = Rehearsal(tmp_path, 1, only=["build"])
    assert suite.run() == 0
    assert "built from other sources" in suite.results["stages"]["build"]["reason"]
    assert (machine / "package/_cuda.so").read_text() == "9.0a 0", "for this card, without the CPU library"


def test_files_of_another_commit_or_card_are_refused(whole: Path, tmp_path: Path, monkeypatch) -> None:
    copied(whole, tmp_path, 1, 2)
    path = tmp_path / "slot-2/results.json"
    path.write_text(path.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    with pytest.raises(ValueError, match="not of one commit: 0123456789abcdef and fedcba9876543210"):
        choose(tmp_path, monkeypatch, (1, 2))
    path.write_text(path.read_text().replace("fedcba9876543210", "0123456789abcdef").replace("H100 80GB", "H200"))
    with pytest.raises(ValueError, match="not of one gpu: NVIDIA H100 80GB HBM3 and NVIDIA H200 HBM3"):
        choose(tmp_path, monkeypatch, (1, 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_killed_leaves_what_it_had_and_no_process_and_goes_on(
    machine: Path, tmp_path: Path, monkeypatch, number: signal.Signals
) -> None:
    # Whoever still runs holds the pipe open.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    behave(machine, ends=int(number), pipe=str(pipe), results=str(tmp_path / "slot-1/results.json"))
    command = [sys.executable, "-m", "tests.gpu_suite.double", str(tmp_path), "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if number == signal.SIGKILL:
        assert ended.returncode == -signal.SIGKILL
    else:
        assert "stopped by SIGTERM" in (tmp_path / "slot-1/results.json").read_text()
    patience = time.monotonic() + 60
    while True:
        try:
            assert os.read(reader, 1) == b"", "the end: nobody holds it"
            break
        except BlockingIOError:
            assert time.monotonic() < patience, "a process of the suite still runs"
            time.sleep(0.02)
    os.close(reader)
    left = read(tmp_path, 1)
    assert statuses(left)["tests"] == "passed"
    assert {row["extra_info"]["op"] for row in left["benchmarks"]} == {"attention", "add_layer_norm"}

    behave(machine)
    suite = Rehearsal(tmp_path, 1)
    assert suite.run() == 0, "\n".join(suite.said)
    assert "tests: passed before" in suite.said
    cases = (machine / "journal").read_text().splitlines()
    assert [case.split("-")[0] for case in cases] == ["attention", "add_layer_norm", "gelu_ffn"], "none again"
    rows = read(tmp_path, 1)["benchmarks"]
    assert len({(r["extra_info"]["case"], r["extra_info"]["contender"]) for r in rows}) == len(rows) == 12

    monkeypatch.setenv("RK_SUITE_COMMIT", "fedcba9876543210")
    anew = Rehearsal(tmp_path, 1, only=["build"])
    assert anew.results["benchmarks"] == []
    assert "begun anew" in anew.said[0]
