"""The bundle is taken for its own sources, architecture and processor, and for no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_suite import bundle

from .double import make_machine

cuda_build = bundle.cuda_build
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_machine(tmp_path)
    return tmp_path / "bundle"


def test_it_is_put_into_the_package_with_what_its_build_said(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "build_report.json").write_text(json.dumps({"cpu": "built", "isas": ["avx2"], "cuda": "not built"}))
    assert bundle.install(package, "9.0a", folder) is None
    assert (package / "_cuda.so").read_text() == "prebuilt"
    report = json.loads((package / "build_report.json").read_text())
    assert report == {"cpu": "built", "isas": ["avx2"], "cuda": "built", "cuda_architectures": ["9.0a"]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": "0"}, "other sources"),
        ({"cuda_architectures": ["8.0"]}, "for 8.0, and this is 9.0a"),
        ({"machine": "aarch64"}, "for aarch64"),
    ],
)
def test_what_it_is_not_for(folder: Path, tmp_path: Path, change: dict, says: str) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in str(bundle.install(tmp_path / "package", "9.0a", folder))
    assert not (tmp_path / "package/_cuda.so").exists()


def test_there_is_none(tmp_path: Path) -> None:
    assert "make gpu-bundle" in str(bundle.why_not("9.0a", tmp_path))


def test_every_source_is_in_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["csrc/library.cpp", "csrc/tensor_checks.h", "roberta_kernels/schemas.def"]
    files += [f"csrc/cuda/a{suffix}" for suffix in (".cu", ".cuh", ".h", ".cpp")]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(cuda_build, "ROOT", tmp_path)
    seen = {cuda_build.sources_hash()}
    for name in files:
        (tmp_path / name).write_text("two")
        seen.add(cuda_build.sources_hash())
    (tmp_path / "csrc/cuda/b.cu").write_text("")
    seen.add(cuda_build.sources_hash())
    assert len(seen) == len(files) + 2


def test_what_a_suite_builds_is_the_cuda_library_alone() -> None:
    environment = {**os.environ, "ROBERTA_KERNELS_CPU": "0", "ROBERTA_KERNELS_CUDA": "0"}
    code = "import setuptools; setuptools.setup = lambda ext_modules, **_: print([e.name for e in ext_modules]); "
    code += (
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
