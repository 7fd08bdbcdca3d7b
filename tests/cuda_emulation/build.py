"""Builds the CUDA library for the CPU: csrc/cuda compiled by g++ against the emulation in this folder.

`python tests/cuda_emulation/build.py` writes build/cuda_emulation/sanitized/_cuda_emulated.so (with the address and
undefined-behaviour sanitizers; --plain: without, in plain/) and prints how to run tests on it. `-- COMMAND ...` runs a
command with it:

    python tests/cuda_emulation/build.py -- python -m pytest tests/ops -k cuda
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import cuda_build  # noqa: E402

# CUTLASS's kernels for Hopper are not emulated: exempt.cpp takes their place. (Our own use of wgmma and TMA is.)
EXEMPT = {"gelu_ffn_bfloat16_sm90.cu", "gelu_ffn_float16_sm90.cu"}
# Built where CUTLASS's headers are (else the op has one variant less). Those of its headers that hold PTX are replaced
# by those in cutlass/. Its classes have types that bear the name of another, which g++ takes with -fpermissive alone.
NEED_CUTLASS = {"gelu_ffn_sm80.cu"}
CUTLASS_FLAGS = "-O1 -fpermissive -w"
# What the library under the sanitizers does without: CUTLASS, whose arrays of 16-bit numbers are read by words of four
# bytes and shifted further than C++ allows; and Hopper's kernels, which a test of their own runs under the sanitizers.
UNSANITIZED = ("sm80.cu", "sm90.cu")
# The epilogue of the exempt ones, for tests of its own; CUTLASS's headers for Hopper make maps of tensors by the
# driver's function, and only for an nvcc that knows Hopper.
EPILOGUE = "gelu_ffn_sm90_epilogue.cpp"
EPILOGUE_FLAGS = "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL -D__CUDACC_VER_MAJOR__=12 -D__CUDACC_VER_MINOR__=8"
# Kernels that use the copy engine: in a build without the sanitizers their loads and stores are followed
# (emulator_proxies.cpp).
FOLLOWED = ("sm90.cu", "faults.cu")
FOLLOW = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0"
# To count, all of them, as they are written: nothing merged, split or left out, and with frame pointers.
_UNDONE = (
    "-fno-tree-sra -fno-ipa-sra -fno-tree-fre -fno-tree-forwprop -fno-tree-dse -fno-tree-dce -fno-tree-pre "
    "-fno-tree-dominator-opts -fno-store-merging -fno-tree-vrp -fno-tree-ccp -fno-tree-loop-optimize "
    "-fno-tree-copy-prop -fno-tree-sink -fno-tree-phiprop -fno-tree-slsr -fno-tree-ter"
)
COUNTED = f"{FOLLOW} -O1 -fno-omit-frame-pointer -fno-optimize-sibling-calls {_UNDONE}"
EMULATOR = [
    HERE / name for name in ("emulator.cpp", "emulator_counts.cpp", "emulator_proxies.cpp", "emulator_sm90.cpp")
]
FAULTS = [HERE / "faults.cu"]  # kernels that test the emulation itself
NAME = "_cuda_emulated.so"
BUILD = ROOT / "build/cuda_emulation"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-unused-function",
]
# As it is written: with -O1 it takes three times as long to compile, and the tests are a third quicker. Of debug
# information, the lines of functions, which the sanitizers' reports name.
SANITIZERS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def cuda_include() -> Path | None:
    """Where cuda_runtime.h is, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    if nvcc:
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    return next((path for path in candidates if (path / "cuda_runtime.h").is_file()), None)


def missing() -> str | None:
    """What the emulation needs and this machine lacks, or None."""
    if platform.machine() != "x86_64":
        return f"its threads switch stacks in x86-64 assembly, and this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "g++ was not found"
    if cuda_include() is None:
        return "the CUDA headers (cuda_runtime.h) were found neither beside nvcc nor in CUDA_HOME/include"
    return None


def has_cutlass() -> bool:
    return cuda_build.cutlass_include() is not None


def kernel_sources(*, sanitize: bool = False) -> list[Path]:
    """The CUDA library: all of csrc/cuda that can be emulated, or that the sanitizers look at."""
    sources = [ROOT / "csrc/library.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if sanitize:
        return sources + [path for path in kernels if not path.name.endswith(UNSANITIZED)]
    left_out = EXEMPT if has_cutlass() else EXEMPT | NEED_CUTLASS
    return [*sorted(HERE.glob("exempt*.cpp")), *sources, *(path for path in kernels if path.name not in left_out)]


def library(kind: str, *, sources: list[Path] | None = None, name: str = NAME) -> Path:
    """Builds what is out of date, with ninja; returns the library. CalledProcessError: the compiler has said why.

    kind: "plain"; "sanitized", with the address and undefined-behaviour sanitizers; "counted", so that what kernels do
    is counted (count.py). sources: what to compile beside the emulator; by default the CUDA library, registered with
    torch. name: of the library. Those of one kind share their objects, and are built one at a time.
    """
    import torch

    why = missing()
    if why:
        raise RuntimeError(f"the CUDA emulation cannot be built: {why}")
    folder, sanitize, count = BUILD / kind, kind == "sanitized", kind == "counted"
    folder.mkdir(parents=True, exist_ok=True)
    torch_include, torch_lib = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    includes = [HERE, ROOT, cuda_include(), torch_include, torch_include / "torch/csrc/api/include"]
    variants, libraries = "-DROBERTA_KERNELS_SM90A" + " -DROBERTA_KERNELS_CUTLASS" * has_cutlass(), ""
    if sources is None:
        sources = kernel_sources(sanitize=sanitize)
        variants = "" if sanitize else variants
        libraries = f"-L{torch_lib} -ltorch_cpu -lc10 -Wl,-rpath,{torch_lib}"
    flags = [*FLAGS, *(SANITIZERS if sanitize else ["-O2"]), *(f"-I{path}" for path in includes)]
    defines = "-DUSE_CUDA -DROBERTA_KERNELS_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 $variants"
    compile_command = (
        f"g++ -x c++ $first $flags {defines} -include {HERE / 'emulation.h'} $last -MD -MF $out.d -c $in -o $out"
    )
    lines = [
        f"flags = {' '.join(flags)}",
        f"rule compile\n  command = {compile_command}\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared {' '.join(SANITIZERS if sanitize else [])} $in -o $out {libraries}",
    ]
    objects = []
    for source in [*EMULATOR, *sources]:
        objects.append(f"{source.stem}{source.suffix.replace('.', '_')}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
        if source not in EMULATOR:
            lines.append(f"  variants = {variants}")
        if source.name in NEED_CUTLASS or source.name == EPILOGUE:
            ours = ["cutlass"] if source.name in NEED_CUTLASS else ["cutlass_sm90", "cutlass"]
            lines.append(f"  first = {' '.join(f'-I{HERE / name}' for name in ours)}")
            headers = (
                f"-I{cuda_include()}/cccl -I{cuda_build.cutlass_include()} -include {HERE / ours[0] / 'prelude.h'}"
            )
            more = EPILOGUE_FLAGS if source.name == EPILOGUE else COUNTED if count else ""
            lines.append(f"  last = {CUTLASS_FLAGS} {headers} {more}")
        elif source.suffix == ".cu" and count:
            lines.append(f"  last = {COUNTED}")
        elif source.suffix == ".cu" and not sanitize:
            lines.append(f"  last = -O1 {FOLLOW if source.name.endswith(FOLLOWED) else ''}")
    lines.append(f"build {name}: link {' '.join(objects)}\n")
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja, "-C", str(folder), "--quiet"], check=True)
    return folder / name


def environment(built: Path, *, sanitize: bool = True) -> dict[str, str]:
    """What to set so that the cuda backend of a Python process is the emulated library."""
    settings = {"ROBERTA_KERNELS_CUDA_EMULATION": str(built)}
    if sanitize:
        found = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        # The sanitizer must be in the process first. Python and torch leave memory to the operating system at exit.
        settings["LD_PRELOAD"] = " ".join(found)
        settings["ASAN_OPTIONS"] = "detect_leaks=0:protect_shadow_gap=1:allocator_may_return_null=1"
        settings["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="without the sanitizers: some five times faster")
    parser.add_argument("command", nargs="*", help="run with the library in place, after --")
    arguments = parser.parse_args()
    built = library("plain" if arguments.plain else "sanitized")
    settings = environment(built, sanitize=not arguments.plain)
    if not arguments.command:
        print(" ".join(f"{name}='{value}'" for name, value in settings.items()))
        return
    command = [sys.executable if arguments.command[0] == "python" else arguments.command[0], *arguments.command[1:]]
    os.execvpe(command[0], command, {**os.environ, **settings})


if __name__ == "__main__":
    main()
