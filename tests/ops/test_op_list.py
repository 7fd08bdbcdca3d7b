"""schemas.def is the list of ops; each place that does not read it has exactly its rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import benchmarks.gpu_suite.plan
import benchmarks.ops
import benchmarks.plots
from roberta_kernels import backends, ops, reference
from roberta_kernels.backends.choosing import NOT_IN_CUDA
from roberta_kernels.schemas import OPS, schemas

from .samples import MAKERS

ROOT = Path(__file__).resolve().parents[2]
# Files that are no op's, by place; `*` stands for anything. What is left must be the ops.
COLUMNS = {
    "roberta_kernels/ops/*.py": {"__init__", "contract", "matmul_precision", "seeds"},
    "roberta_kernels/reference/*.py": {"__init__", "layer_norm", "philox", "precision"},
    "csrc/cpu/*_binding.cpp": {"checksum", "encoder", "linear", "packed_encoder"},
    "csrc/cuda/*_binding.cpp": {"encoder"},
    "benchmarks/ops/*.py": {"__init__"},
}


def test_an_op_is_forward_and_backward() -> None:
    assert list(schemas()) == [f"{op}_{direction}" for op in OPS for direction in ("forward", "backward")]
    assert len(OPS) >= 5


@pytest.mark.parametrize("place", COLUMNS)
def test_a_file_for_each_op_and_no_other(place: str) -> None:
    before, after = place.split("*")
    folder = ROOT / Path(before)
    stems = {path.name.removesuffix(after) for path in folder.glob(f"*{after}")}
    here = set(OPS) - NOT_IN_CUDA if "csrc/cuda" in place else set(OPS)
    assert stems - COLUMNS[place] == here, "add the op, or name the file above as one that is no op's"


@pytest.mark.parametrize("place", ["roberta_kernels/triton/*.py", "tests/ops/test_*.py"])
def test_a_file_for_each_op(place: str) -> None:
    """Beside others, in these."""
    assert all((ROOT / place.replace("*", op)).is_file() for op in OPS)


@pytest.mark.parametrize(
    ("listed", "where"),
    [
        (set(ops.__all__) - {"draw_seeds"}, "roberta_kernels.ops"),
        (set(MAKERS), "tests/ops/samples.py"),
        (set(benchmarks.ops.OPS), "benchmarks.ops"),
        (set(benchmarks.gpu_suite.plan.CUDA_OPS) | NOT_IN_CUDA, "benchmarks.gpu_suite.plan"),
        (set(benchmarks.plots._MARKERS), "benchmarks.plots"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_for_each_op(listed: set[str], where: str) -> None:
    assert listed == set(OPS), where


def test_kernels_for_each_schema() -> None:
    assert list(reference.KERNELS) == list(schemas())
    for kernels in backends.namespaces().values():
        assert set(schemas()) <= set(vars(kernels)), kernels


def test_triton_kernels_for_each_schema() -> None:
    pytest.importorskip("triton")
    from roberta_kernels.triton import KERNELS

    assert list(KERNELS) == list(schemas())


def test_the_compiled_sources_for_each_op() -> None:
    """setup.py reads the list from the same file, without importing the package."""
    source = (ROOT / "setup.py").read_text()
    line = next(line for line in source.splitlines() if line.startswith("OPS = "))
    scope: dict[str, object] = {"ROOT": ROOT, "re": re}
    exec(line, scope)
    assert scope["OPS"] == list(OPS)
