"""What the suite selects are all tests that need a card: none is left out for want of a mark or by its folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_suite import plan
from roberta_kernels.backends import choosing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A test that needs a card says so in some way; to collect the others, too, would take three times as long.
MENTIONS = re.compile(
    r"HAS_CUDA|is_available\(\)|mark\.gpu|every_backend|served_by|cuda_variants|[\"']cuda[\"']|\.cuda\(\)"
)
VARIANTS = {op: list(known) for op, known in choosing.VARIANTS.items()}
# A plugin: tests are collected as on a machine with a Hopper GPU and the CUDA library, or as here.
COLLECT = """
import json, os, pytest, torch
if os.environ["RK_PRETEND"]:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.version.cuda = "13.0"
    from roberta_kernels import backends
    from roberta_kernels.backends import op_namespaces
    import contextlib
    op_namespaces._status["cuda"] = backends.BackendStatus(True, "pretended")
    @contextlib.contextmanager
    def use(*_):
        yield
    backends.use_cuda_variant = backends.backend = use

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    from _pytest.skipping import evaluate_skip_marks
    from benchmarks.gpu_suite.outcomes import backend_of
    found = {}
    for item in items:
        file = os.path.relpath(item.path, os.environ["RK_ROOT"])
        marked = item.get_closest_marker("gpu") is not None
        found[item.nodeid] = [file, marked, backend_of(item), evaluate_skip_marks(item) is not None]
    with open(os.environ["RK_FOUND"], "w") as stream:
        json.dump(found, stream)
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list[dict[str, tuple[str, bool, str, bool]]]:
    """[with a card, without]: node -> (file, whether it is marked gpu, whose test it is, whether it is skipped)."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "pretends.py").write_text(COLLECT)
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if p.parent != HERE and MENTIONS.search(p.read_text())]
    running = []
    for pretend in ("1", ""):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
        environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "RK_PRETEND": pretend, "RK_ROOT": str(ROOT)}
        environment["RK_FOUND"] = str(folder / f"found{pretend}.json")
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "pretends", "-p", "no:cacheprovider"]
        command += [str(path) for path in files]
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    for process in running:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said.decode()[-3000:]
    return [json.loads((folder / f"found{pretend}.json").read_text()) for pretend in ("1", "")]


@pytest.mark.full  # collects all tests, twice
def test_every_test_that_needs_a_card_is_selected(collected) -> None:
    with_card, without = collected
    needs = {node for node, told in with_card.items() if not told[3] and (node not in without or without[node][3])}
    assert len(needs) > 500
    selections = [*plan.variant_tests(VARIANTS), *plan.backend_tests(VARIANTS), *plan.triton_tests()]
    missed = []
    for node in needs:
        file, marked, backend, _ = with_card[node]
        if not marked or not any(one.backend == backend and plan.selects(one, file) for one in selections):
            missed.append(node)
    assert missed == [], "they need the mark gpu, or their file a place in plan.GPU_TESTS"


@pytest.mark.full
def test_no_selection_is_empty(collected) -> None:
    """Each variant has tests that say its name, and every op's sanitizer some."""
    nodes = [node for node, told in collected[0].items() if told[1] and not told[3]]
    for one in [*plan.variant_tests(VARIANTS), *plan.sanitizer_tests(VARIANTS)]:
        words = one.expression.split(" and ") if one.expression else []
        mine = [node for node in nodes if node.startswith(one.paths) and all(word in node for word in words)]
        assert len(mine) >= max(5, one.take), one.name
    for one in [*plan.backend_tests(VARIANTS), *plan.triton_tests()]:
        mine = [n for n in nodes if plan.selects(one, collected[0][n][0]) and collected[0][n][2] == one.backend]
        assert len(mine) >= one.shards, one.name


def test_a_slot_keeps_time_for_what_comes_last() -> None:
    for stages in plan.SLOTS.values():
        assert sum(stage.kept for stage in stages) + stages[0].most + plan.ENDING <= plan.LIMIT
        assert all(stage.kept <= stage.most for stage in stages)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ({"passed": 3}, "passed"),
        ({"passed": 3, "failed": 1, "exit_status": 1}, "failed"),
        ({"skipped": 3, "reasons": ["not in this build"]}, "failed"),
        ({"exit_status": 5}, "failed"),
        ({"passed": 3, "exit_status": -11}, "failed"),
        ({"passed": 3, "exit_status": -15, "out_of_time": True}, "late"),
        ({"exit_status": None, "out_of_time": True}, "late"),
        ({"passed": 1, "failed": 1, "exit_status": -15, "out_of_time": True}, "failed"),
        ({"passed": 3, "exit_status": 99}, "failed"),
    ],
)
def test_verdicts(outcome: dict, expected: str) -> None:
    assert plan.verdict([{**NOTHING, **outcome}])[0] == expected


NOTHING = {
    "passed": 0,
    "failed": 0,
    "skipped": 0,
    "exit_status": 0,
    "out_of_time": False,
    "failures": [],
    "reasons": [],
}


def test_a_process_without_a_test_is_no_failure_among_others() -> None:
    passed = {**NOTHING, "passed": 1}
    assert plan.verdict([passed, {**NOTHING, "exit_status": 5}])[0] == "passed"
    assert plan.verdict([passed, {**NOTHING, "exit_status": 1, "failed": 1}])[0] == "failed"
    assert plan.verdict([passed, {**NOTHING, "exit_status": None, "out_of_time": True}])[0] == "late"
