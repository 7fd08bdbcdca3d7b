"""Builds csrc/ with ninja through torch's BuildExtension, against torch's stable ABI.

Environment variables:
    ROBERTA_KERNELS_CPU      0: leave the CPU library out (minutes, for who wants the CUDA library alone).
    ROBERTA_KERNELS_CUDA     1: build the CUDA library whatever torch says; 0: never; unset: when nvcc is there and
                             torch is a CUDA build. Whether this machine has a GPU plays no part.
    TORCH_CUDA_ARCH_LIST     architectures of the CUDA library, in numbers ("9.0a", "8.0;8.6;10.0+PTX"); unset: those
                             of csrc/cuda/cuda_build.py, which says which file is compiled for which.
    ROBERTA_KERNELS_CUTLASS  a checkout of CUTLASS whose headers to use; unset: those of the nvidia-cutlass package.
    MAX_JOBS                 compiler processes at a time.
    CXX, CXXFLAGS            compiler and extra flags (CXXFLAGS=-g: with debug information, many times the size).

The libraries hold no Python symbol: they register their ops when `torch.ops.load_library` opens them. So one
wheel (py3-none-<platform>) supports every Python and every torch from the floor up.

The CUDA library carries its own CUDA runtime, linked statically as nvcc does by default, with its symbols hidden: a
torch for CUDA 12 brings libcudart.so.12 and one for CUDA 13 libcudart.so.13, and a library linked against either would
load in no process of the other. Runtimes share a device's context and its streams through the driver, which is how
cuBLAS and NCCL, which carry theirs too, work inside of torch. What remains to be met is the driver: one that knows the
nvcc that compiled (for CUDA 13: 580 or later). The CUDA library needs a few functions of libtorch_cuda, which a CPU
build of torch lacks; it is linked against a stub of that library, so that every torch makes the same wheel.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc/cuda"))  # a build process has not even its own directory on the path
import cuda_build  # noqa: E402

TORCH_FLOOR = (2, 10)
# torch 2.10 as the stable ABI writes it: one byte each for major and minor, from the top.
TORCH_TARGET_VERSION = "0x020a000000000000"

# The CPU kernels are compiled once per instruction set and chosen at run time (csrc/cpu/dispatch.h).
AVX512_BF16 = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512bf16", "-mavx512vnni"),
    *("-mfma", "-mprefer-vector-width=512"),
]
X86_ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "avx512_bf16": AVX512_BF16,
    "amx": [
        *AVX512_BF16,
        "-DRK_CPU_ISA_AVX512_BF16",
    ],  # its tile instructions are written in assembler (csrc/cpu/amx.h)
}
OPS = re.findall(r'^RK_SCHEMA\("(\w+)_forward\(', (ROOT / "roberta_kernels/schemas.def").read_text(), re.MULTILINE)
CPU_OPS = [*OPS, "encoder", "packed_encoder", "linear"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# Python's own flags ask for debug information, which is nine tenths of the library.
if not cuda_build.debugs():
    CXX_FLAGS.append("-g0")
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
    asked = os.environ.get("ROBERTA_KERNELS_CUDA", "")
    if not cuda_build.kernel_sources():
        return "this version has no CUDA C++ kernels (Triton is used on NVIDIA GPUs)"
    if asked == "0":
        return "turned off by ROBERTA_KERNELS_CUDA=0"
    if asked != "1" and torch.version.cuda is None:
        return "torch is a CPU build (ROBERTA_KERNELS_CUDA=1 builds the CUDA library all the same)"
    why = cuda_build.missing()
    if why is not None and asked == "1":
        raise SystemExit(f"ROBERTA_KERNELS_CUDA=1, but {why}")
    return why


def cuda_architectures(nvcc: str) -> tuple[cuda_build.Architecture, ...]:
    try:
        return cuda_build.listed_architectures(nvcc)
    except ValueError as error:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {error}") from None


# All that the CUDA library calls in libtorch_cuda. One that is not here is an error of the link: whoever adds it sees
# to it that the oldest torch has it.
TORCH_CUDA_FUNCTIONS = ["aoti_torch_get_current_cuda_stream", "aoti_torch_cuda_mm_out", "aoti_torch_cuda_addmm_out"]


def torch_cuda_stub(directory: Path) -> Path:
    """A directory with a libtorch_cuda.so to link against that holds those functions and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "torch_cuda.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in TORCH_CUDA_FUNCTIONS))
    cxx = os.environ.get("CXX", "g++").split()
    library = directory / "libtorch_cuda.so"
    subprocess.run([*cxx, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", library, source], check=True)
    return directory


def import_torch():
    try:
        import torch
    except ImportError:
        return None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        raise SystemExit(
            f"roberta_kernels requires torch >= {'.'.join(map(str, TORCH_FLOOR))} to build, got {torch.__version__}"
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
    for name in ("ROBERTA_KERNELS_CUDA", "ROBERTA_KERNELS_CPU"):
        if os.environ.get(name, "") not in ("", "0", "1"):
            raise SystemExit(f"{name} must be 0, 1 or unset, got {os.environ[name]!r}")
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
        say(f"compiled kernels left out: {why}; Triton and plain torch will be used")
        return [], None
    if any("pip-build-env" in entry for entry in sys.path):
        say(
            f"built in isolation against torch {torch.__version__}; it will run with any torch >= 2.10, "
            "but `pip install --no-build-isolation .` builds against your own"
        )

    ninja = cuda_build.find_ninja()
    if ninja is not None and shutil.which("ninja") is None:  # where torch looks for it
        os.environ["PATH"] += os.pathsep + str(Path(ninja).parent)
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    common = {
        "include_dirs": [str(ROOT)],
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        "py_limited_api": True,
    }
    cpu = [
        CppExtension(
            "roberta_kernels._cpu",
            [
                "csrc/library.cpp",
                "csrc/cpu/dispatch.cpp",
                *(f"csrc/cpu/{op}_binding.cpp" for op in (*CPU_OPS, "checksum")),
            ],
            depends=[
                str(p.relative_to(ROOT)) for p in sorted([*(ROOT / "csrc/cpu").iterdir(), *(ROOT / "csrc").glob("*.h")])
            ]
            + ["roberta_kernels/schemas.def"],
            extra_compile_args={"cxx": CXX_FLAGS},
            **common,
        )
    ]
    extensions: list[Extension] = []
    if os.environ.get("ROBERTA_KERNELS_CPU") == "0":
        REPORT["cpu"] = "turned off by ROBERTA_KERNELS_CPU=0"
    else:
        extensions += cpu
        REPORT["cpu"] = "built"
        REPORT["isas"] = list(isas())

    why = cuda_missing(torch)
    REPORT["cuda"] = why or "built"
    architectures: tuple[cuda_build.Architecture, ...] = ()
    if why is None:
        nvcc = cuda_build.find_nvcc()
        assert nvcc is not None
        architectures = cuda_architectures(nvcc)
        REPORT["nvcc"] = cuda_build.nvcc_version(nvcc)
        REPORT["cuda_architectures"] = [str(a) for a in architectures]
        cutlass = cuda_build.cutlass_include()
        REPORT["cutlass"] = "its headers were not found (pip install nvidia-cutlass)" if cutlass is None else "built"
        macros = ["ROBERTA_KERNELS_CUDA", "USE_CUDA", *cuda_build.definitions(architectures)]
        cuda = CppExtension(
            "roberta_kernels._cuda",
            cuda_build.host_sources(),
            depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/cuda").iterdir()) if p.is_file()]
            + ["roberta_kernels/schemas.def"],
            extra_compile_args={"cxx": CXX_FLAGS},
            # Everything undefined is an error of the link: it would be one of every load.
            extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,-z,defs"],
            **{**common, "define_macros": [*common["define_macros"], *((name, "1") for name in macros)]},
        )
        # <device.h>, <launch.cuh> and <ptx.cuh> are found by the include path: tests put others in their place.
        cuda.include_dirs += [
            str(ROOT / "csrc/cuda"),
            str(cuda_build.toolkit_directory(nvcc, "include", "cuda_runtime.h")),
        ]
        cuda.library_dirs += [str(cuda_build.toolkit_directory(nvcc, "lib", "libcudart_static.a"))]
        cuda.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
        extensions.append(cuda)

    class BuildKernels(BuildExtension):
        """Compiles the CPU ops once per instruction set, and the CUDA kernels; then links each into one library."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable install would compile in a folder that it throws away, and a wheel all of it once more.
            self.build_temp = str(ROOT / "build/temp")

        def build_extension(self, ext) -> None:
            if ext.name.endswith("._cuda"):
                names = ", ".join(map(str, architectures))
                say(f"compiling the CUDA kernels for {names} (minutes; TORCH_CUDA_ARCH_LIST=9.0a, say, for one alone)")
                folder = cuda_build.build_folder(architectures)
                ext.extra_objects += map(str, cuda_build.compile_kernels(architectures, folder).values())
                ext.library_dirs.insert(0, str(torch_cuda_stub(folder / "stub")))
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
