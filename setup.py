"""Builds csrc/ with ninja through torch's BuildExtension, against torch's stable ABI.

Environment variables:
    ROBERTA_KERNELS_CUDA   1: build the CUDA library whatever torch says; 0: never; unset: when nvcc is there and
                           torch is a CUDA build. Whether this machine has a GPU plays no part.
    TORCH_CUDA_ARCH_LIST   architectures of the CUDA library, as for any torch extension.
    MAX_JOBS               compiler processes at a time.
    CXX, CXXFLAGS          compiler and extra flags.

The libraries hold no Python symbol: they register their ops when `torch.ops.load_library` opens them. So one
wheel (py3-none-<platform>) serves every Python and every torch from the floor up.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = (2, 10)
# torch 2.10 as the stable ABI writes it: one byte each for major and minor, from the top.
TORCH_TARGET_VERSION = "0x020a000000000000"

# The CPU kernels are compiled once per instruction set and chosen at run time (csrc/cpu/dispatch.h).
X86_ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "avx512_bf16": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        *("-mfma", "-mprefer-vector-width=512"),
    ],
}
CPU_OPS = ["attention", "add_layer_norm", "gelu_ffn", "embedding_layer_norm"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# Error messages name source files by their place in the project.
CXX_FLAGS.append(f"-ffile-prefix-map={ROOT}/=")


def say(line: str) -> None:
    print(f"roberta_kernels: {line}", file=sys.stderr, flush=True)


def isas() -> dict[str, list[str]]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_ISAS
    return {"portable": []}


def compiler_missing() -> str | None:
    """Why the C++ code cannot be compiled, or None."""
    if sys.platform != "linux":
        return f"the compiled kernels are built on Linux only, and this is {sys.platform}"
    cxx = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(cxx) is None:
        return f"no C++ compiler: {cxx} was not found (install g++, or set CXX, and install again)"
    return None


def cuda_missing(torch) -> str | None:
    """Why the CUDA library is not built, or None."""
    wish = os.environ.get("ROBERTA_KERNELS_CUDA", "")
    if not list((ROOT / "csrc/cuda").glob("*.cu")):
        return "this version has no CUDA C++ kernels (NVIDIA GPUs are served by Triton)"
    if wish == "0":
        return "turned off by ROBERTA_KERNELS_CUDA=0"
    nvcc = shutil.which("nvcc") or (
        os.environ.get("CUDA_HOME") and shutil.which("nvcc", path=os.environ["CUDA_HOME"] + "/bin")
    )
    if nvcc is None:
        if wish == "1":
            raise SystemExit("ROBERTA_KERNELS_CUDA=1, but nvcc was found neither on PATH nor in CUDA_HOME/bin")
        return "nvcc was not found"
    if wish != "1" and torch.version.cuda is None:
        return "torch is a CPU build (ROBERTA_KERNELS_CUDA=1 builds the CUDA library all the same)"
    return None


def import_torch():
    try:
        import torch
    except ImportError:
        return None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        raise SystemExit(
            f"roberta_kernels needs torch >= {'.'.join(map(str, TORCH_FLOOR))} to build, and found {torch.__version__}"
        )
    return torch


class BuildPy(build_py):
    """Adds build_report.json: what was compiled, against what, and why the rest was not."""

    def run(self) -> None:
        super().run()
        target = Path(
            self.get_package_dir("roberta_kernels") if self.editable_mode else self.build_lib + "/roberta_kernels"
        )
        target.mkdir(parents=True, exist_ok=True)
        (target / "build_report.json").write_text(json.dumps(REPORT, indent=2) + "\n")


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, plat = super().get_tag()
        return ("py3", "none", plat)


def compiled_parts():
    """(extensions, build_ext command class), filling in REPORT on the way."""
    if os.environ.get("ROBERTA_KERNELS_CUDA", "") not in ("", "0", "1"):
        raise SystemExit(f"ROBERTA_KERNELS_CUDA must be 0, 1 or unset, not {os.environ['ROBERTA_KERNELS_CUDA']!r}")
    torch = import_torch()
    why: str | None
    if torch is None:
        why = "torch is not installed where the build ran (use: pip install --no-build-isolation .)"
        REPORT.update(cpu=why, cuda=why)
        say(f"compiled kernels left out: {why}")
        return [], None
    REPORT["torch"] = torch.__version__
    why = compiler_missing()
    if why:
        REPORT.update(cpu=why, cuda=why)
        say(f"compiled kernels left out: {why}; Triton and plain torch will serve")
        return [], None
    if any("pip-build-env" in entry for entry in sys.path):
        say(
            f"built in isolation against torch {torch.__version__}; it will run with any torch >= 2.10, "
            "but `pip install --no-build-isolation .` builds against your own"
        )

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    common = {
        "include_dirs": [str(ROOT)],
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        "py_limited_api": True,
    }
    extensions: list[Extension] = [
        CppExtension(
            "roberta_kernels._cpu",
            ["csrc/library.cpp", "csrc/cpu/dispatch.cpp", *(f"csrc/cpu/{op}_binding.cpp" for op in CPU_OPS)],
            depends=[str(p.relative_to(ROOT)) for p in sorted([*(ROOT / "csrc/cpu").iterdir(), *(ROOT / "csrc").glob("*.h")])]
            + ["roberta_kernels/schemas.def"],
            extra_compile_args={"cxx": CXX_FLAGS},
            **common,
        )
    ]
    REPORT["cpu"] = "built"
    REPORT["isas"] = list(isas())

    why = cuda_missing(torch)
    REPORT["cuda"] = why or "built"
    if why is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")
        cuda = Extension(
            "roberta_kernels._cuda",
            ["csrc/library.cpp", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cuda").glob("*.cu")))],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++17", "-lineinfo"]},
            **{**common, "define_macros": [*common["define_macros"], ("ROBERTA_KERNELS_CUDA", "1"), ("USE_CUDA", "1")]},
        )
        cuda.include_dirs += CppExtension("x", []).include_dirs
        extensions.append(cuda)

    class BuildKernels(BuildExtension):
        """Compiles the CPU ops once per instruction set, then links all of it into one library."""

        def build_extension(self, ext) -> None:
            if ext.name.endswith("._cpu"):
                for isa, flags in isas().items():
                    objects = self.compiler.compile(
                        [f"csrc/cpu/{op}.cpp" for op in CPU_OPS],
                        output_dir=os.path.join(self.build_temp, isa),
                        include_dirs=[str(ROOT)],
                        extra_postargs={
                            "cxx": [*CXX_FLAGS, *flags, f"-DRK_CPU_ISA={isa}", f"-DRK_CPU_ISA_{isa.upper()}"]
                        },
                        depends=ext.depends,
                    )
                    ext.extra_objects += objects
            super().build_extension(ext)

        def get_ext_filename(self, ext_name: str) -> str:
            return os.path.join(*ext_name.split(".")) + ".so"

    return extensions, BuildKernels.with_options(no_python_abi_suffix=True)


REPORT: dict[str, object] = {}
extensions, build_kernels = compiled_parts()
commands = {"build_py": BuildPy, "bdist_wheel": AnyPythonWheel if extensions else bdist_wheel}
if build_kernels is not None:
    commands["build_ext"] = build_kernels

setup(ext_modules=extensions, cmdclass=commands)
