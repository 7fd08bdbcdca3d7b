"""The CUDA library, built beforehand for a Hopper GPU: `make gpu-bundle` makes gpu-bundle/, and the suite takes it
where it is of the sources at hand. So a machine that is lent for minutes spends none of them compiling.

    python -m benchmarks gpu-bundle       # needs nvcc and CUTLASS's headers, and no GPU

gpu-bundle/ is for torch >= 2.10 on x86-64 Linux, whatever Python: `_cuda.so`, stripped, and `bundle.json`: the hash of
the sources, and what the build says of itself.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import cuda_build  # noqa: E402

FOLDER = ROOT / "gpu-bundle"
ARCHITECTURE = "9.0a"
_LARGEST = 56 * 2**20  # bytes: with the sources it has to fit into 64 MiB


def why_not(arch: str, folder: Path = FOLDER) -> str | None:
    """Why the bundle in a folder does not fit these sources on this architecture ("9.0a"), or None."""
    try:
        described = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError):
        return "no bundle (make gpu-bundle)"
    if described["sources"] != cuda_build.sources_hash():
        return "the bundle was built from other sources (make gpu-bundle)"
    if arch not in described["cuda_architectures"]:
        return f"the bundle is for {', '.join(described['cuda_architectures'])}, and this is {arch}"
    if described["machine"] != platform.machine():
        return f"the bundle is for {described['machine']}, and this is {platform.machine()}"
    if not (folder / "_cuda.so").is_file():
        return "the bundle holds no library"
    return None


def install(package: Path, arch: str, folder: Path = FOLDER) -> str | None:
    """Puts the bundle's library into the package; returns why not, or None."""
    reason = why_not(arch, folder)
    if reason is not None:
        return reason
    described = json.loads((folder / "bundle.json").read_text())
    shutil.copyfile(folder / "_cuda.so", package / "_cuda.so.new")
    (package / "_cuda.so.new").replace(package / "_cuda.so")  # a process may have the old one mapped
    _report(package, described["report"])
    return None


def _report(package: Path, built: dict[str, Any]) -> None:
    """build_report.json of the package, with what it says of the CUDA library replaced."""
    path = package / "build_report.json"
    before = json.loads(path.read_text()) if path.is_file() else {"cpu": "not built (ROBERTA_KERNELS_CPU=0)"}
    path.write_text(json.dumps({**before, **built}, indent=2) + "\n")


def make(folder: Path = FOLDER) -> Path:
    """Builds it. Raises RuntimeError where it cannot be built or would be of no use; the compiler has said why."""
    if (missing := cuda_build.missing()) is not None:
        raise RuntimeError(missing)
    if cuda_build.cutlass_include() is None:
        raise RuntimeError("CUTLASS's headers were not found: the variants that need them would be missing")
    hashed = cuda_build.sources_hash()  # first: of what is compiled, whoever edits meanwhile
    built = ROOT / "build/gpu-bundle"
    environment = {
        **os.environ,
        "TORCH_CUDA_ARCH_LIST": ARCHITECTURE,
        "ROBERTA_KERNELS_CUDA": "1",
        "CXXFLAGS": f"-g {os.environ.get('CXXFLAGS', '')}",  # the lines that the sanitizer names
        "ROBERTA_KERNELS_CPU": "0",
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(built)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        raise RuntimeError("the build failed")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_cuda.so"
    subprocess.run(
        ["strip", "--strip-unneeded", "-o", str(library), str(built / "roberta_kernels/_cuda.so")], check=True
    )
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    described = {
        "sources": hashed,
        "machine": platform.machine(),
        "cuda_architectures": [ARCHITECTURE],
        "report": {
            "cuda": "built",
            "cuda_architectures": [ARCHITECTURE],
            "cutlass": "built",
            "nvcc": cuda_build.nvcc_version(nvcc),
            "torch": _torch_version(),
        },
    }
    (folder / "bundle.json").write_text(json.dumps(described, indent=1) + "\n")
    size = library.stat().st_size
    if size > _LARGEST:
        raise RuntimeError(f"{size / 2**20:.0f} MiB: too large to travel with the sources")
    return library


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def run(say: Callable[[str], None]) -> int:
    try:
        library = make()
    except RuntimeError as error:
        say(f"no bundle: {error}")
        return 1
    say(f"{library.relative_to(ROOT)}: {library.stat().st_size / 2**20:.1f} MiB, for {ARCHITECTURE}")
    return 0
