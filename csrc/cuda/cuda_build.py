"""How the CUDA kernels are compiled: which source for which architectures, with what flags, in parallel by ninja.

For setup.py and for the tests of the sources; needs nothing but the standard library, nvcc, a C++ compiler and ninja.

    python csrc/cuda/cuda_build.py           # compiles every kernel into build/cuda/, a ptxas report beside each object
    python csrc/cuda/cuda_build.py --check   # can this machine do that? If not, says why and exits with 1
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda"

# A100; A10, A40, RTX 30; L4, L40, RTX 40; H100, H200; B200, and by its PTX whatever comes after.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0+PTX"
# The same for an nvcc older than 12.8, which does not know Blackwell.
OLDER_ARCHITECTURES = "8.0;8.6;8.9;9.0a;9.0+PTX"
LOWEST = 80  # cp.async and bfloat16 products

# Which files are for one architecture alone: wgmma and TMA exist on Hopper only. Every other file is for every
# architecture of the list. They are compiled when the list names 9.0 or 9.0a; ROBERTA_KERNELS_SM90A is then defined for
# every file, host code included, and whoever calls into them sees to that and to current_device().arch == 90.
ONLY_FOR = {"*_sm90.cu": "90a"}
# Compiled where CUTLASS's headers are found; ROBERTA_KERNELS_CUTLASS is then defined for every file.
NEED_CUTLASS = ("gelu_ffn_sm80.cu", "gelu_ffn_*_sm90.cu")

# Minutes each: begun first, or the last of them runs alone.
LONGEST = (
    "gelu_ffn_sm80.cu",
    "attention_backward.cu",
    "attention_forward.cu",
    "gelu_ffn_bfloat16_sm90.cu",
    "gelu_ffn_float16_sm90.cu",
)

NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-math-errno")
# The report on registers and spills goes to a file, and costs nothing.
REPORT_FLAGS = ("-Xptxas=-v",)


@dataclass(frozen=True)
class Architecture:
    """One entry of an architecture list: "90a" is compute capability 9.0 with what only that one has."""

    name: str
    ptx: bool = False

    @property
    def number(self) -> int:
        return int(self.name.rstrip("af"))

    def flags(self) -> list[str]:
        # The kernels use nothing that 8.6 or 8.9 has beyond 8.0: one run of the compiler does for the three, and only
        # the assembler's part is done for each.
        virtual = "80" if self.number // 10 == 8 else self.name
        code = [f"sm_{self.name}"] + [f"compute_{virtual}"] * self.ptx
        return [f"-gencode=arch=compute_{virtual},code={one}" for one in code]

    def __str__(self) -> str:
        major, minor = re.fullmatch(r"(\d+)(\d[af]?)", self.name).groups()  # type: ignore[union-attr]
        return f"{major}.{minor}{'+PTX' * self.ptx}"


def parse_architectures(text: str) -> tuple[Architecture, ...]:
    """A list as in TORCH_CUDA_ARCH_LIST ("8.0 9.0a;10.0+PTX"), without what is older than the kernels.

    Raises ValueError for an entry that is no number, and for a list that leaves nothing.
    """
    found: dict[Architecture, None] = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"architecture {entry!r} in {text!r}: expected numbers such as 8.0, 9.0a or 10.0+PTX")
        architecture = Architecture(match[1] + match[2], match[3] is not None)
        if architecture.number >= LOWEST:
            found[architecture] = None
    if not found:
        raise ValueError(f"no architecture in {text!r} has the kernels' compute capability of 8.0 or more")
    return tuple(found)


def kernel_sources() -> list[str]:
    return sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))


def host_sources() -> list[str]:
    """The bindings and what they share, relative to the project: for the C++ compiler."""
    return ["csrc/library.cpp", *sorted(f"csrc/cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cpp"))]


def sources_hash() -> str:
    """Of all that the CUDA library is compiled from, this file included: another hash, another library."""
    paths = [ROOT / "csrc/library.cpp", ROOT / "roberta_kernels/schemas.def", *(ROOT / "csrc").glob("*.h")]
    paths += [path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")]
    found = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_bytes()
        found.update(f"{path.relative_to(ROOT).as_posix()} {len(text)}\n".encode() + text)
    return found.hexdigest()


def build_folder(listed: tuple[Architecture, ...]) -> Path:
    """Where objects go: of one architecture not over those of many, which take far longer to compile again."""
    return BUILD if len(listed) > 1 else BUILD.with_name(f"cuda-{listed[0].name}")


def needs_cutlass(source: str) -> bool:
    return any(fnmatch.fnmatch(source, pattern) for pattern in NEED_CUTLASS)


def architectures_of(source: str, listed: tuple[Architecture, ...]) -> tuple[Architecture, ...]:
    """What of the list a source is compiled for; nothing: it is left out."""
    if needs_cutlass(source) and cutlass_include() is None:
        return ()
    for pattern, name in ONLY_FOR.items():
        if fnmatch.fnmatch(source, pattern):
            one = Architecture(name)
            return (one,) if any(a.number == one.number for a in listed) else ()
    return listed


def definitions(listed: tuple[Architecture, ...]) -> list[str]:
    """Macros for every file, host code included."""
    hopper = ["ROBERTA_KERNELS_SM90A"] if any(a.number == 90 for a in listed) else []
    return hopper + (["ROBERTA_KERNELS_CUTLASS"] if cutlass_include() is not None else [])


def find_nvcc() -> str | None:
    """nvcc: of PATH, else of CUDA_HOME or CUDA_PATH, else of /usr/local/cuda."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return shutil.which("nvcc") or next(
        (nvcc for home in homes if home and (nvcc := shutil.which("nvcc", path=f"{home}/bin"))), None
    )


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def default_architectures(nvcc: str) -> tuple[Architecture, ...]:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return parse_architectures(DEFAULT_ARCHITECTURES if "sm_100" in known.split() else OLDER_ARCHITECTURES)


def listed_architectures(nvcc: str) -> tuple[Architecture, ...]:
    """What TORCH_CUDA_ARCH_LIST names, else the default. Raises ValueError for a list that means nothing."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return parse_architectures(given) if given else default_architectures(nvcc)


def toolkit_directory(nvcc: str, kind: str, contents: str) -> Path:
    """The toolkit's directory of headers or libraries (kind: "include", "lib") that holds `contents`."""
    # nvcc on PATH may be a script that calls another: ask it where it stands.
    asked = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    match = re.search(r"^#\$ TOP=(.+)$", asked, re.MULTILINE)
    root = Path(match[1] if match else Path(nvcc).parents[1]).resolve()
    places = [root / kind, root / f"{kind}64", *sorted(root.glob(f"targets/*/{kind}"))]
    for place in places:
        if (place / contents).exists():
            return place
    raise FileNotFoundError(f"{contents} was found in none of {', '.join(map(str, places))}")


def cutlass_include() -> Path | None:
    """CUTLASS's headers: of the checkout that ROBERTA_KERNELS_CUTLASS names, else of the nvidia-cutlass package."""
    given = os.environ.get("ROBERTA_KERNELS_CUTLASS")
    if given:
        places = [Path(given) / "include", Path(given)]
    else:
        spec = importlib.util.find_spec("cutlass_library")
        places = [Path(spec.origin).parent / "source/include"] if spec is not None and spec.origin else []
    return next((place.resolve() for place in places if (place / "cutlass/cutlass.h").is_file()), None)


def find_ninja() -> str | None:
    """ninja: of PATH, else of the ninja package, whose script need not be on PATH."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    return found


def missing() -> str | None:
    """What the kernels cannot be compiled without and is not here, or None."""
    if find_nvcc() is None:
        return "nvcc was found neither on PATH nor in CUDA_HOME/bin"
    if find_ninja() is None:
        return "ninja was not found (pip install ninja)"
    return None


def debugs() -> bool:
    """Whether debug information is asked for (CXXFLAGS=-g): it is most of a library, and tools alone read it."""
    return re.search(r"(^|\s)-g(?!0)", os.environ.get("CXXFLAGS", "")) is not None


def command(source: Path, listed: tuple[Architecture, ...], nvcc: str, extra: tuple[str, ...] = ()) -> list[str]:
    """nvcc and its arguments, short of `-c source -o object`, for a process in ROOT."""
    includes = ["-I.", "-Icsrc/cuda"]
    if needs_cutlass(source.name):
        # CUTLASS calls constexpr functions of the standard library in kernels.
        includes += [f"-I{cutlass_include()}", "--expt-relaxed-constexpr"]
    compiler = [f"-ccbin={os.environ['CXX'].split()[0]}"] if os.environ.get("CXX") else []
    gencode = [flag for a in architectures_of(source.name, listed) for flag in a.flags()]
    defined = [f"-D{name}" for name in definitions(listed)]
    lines = ["-lineinfo"] if debugs() else []
    return [nvcc, *NVCC_FLAGS, *lines, *REPORT_FLAGS, *compiler, *defined, *includes, *gencode, *extra]


def compile_kernels(
    listed: tuple[Architecture, ...],
    build: Path = BUILD,
    sources: list[Path] | None = None,
    extra: tuple[str, ...] = (),
) -> dict[str, Path]:
    """Compiles what is out of date; source name -> object. The ptxas report of x.o stands in x.o.log.

    sources: other kernels than those of csrc/cuda (for tests). extra: more flags.
    Raises subprocess.CalledProcessError; what the compiler said is then on stderr.
    """
    nvcc, ninja = find_nvcc(), find_ninja()
    if nvcc is None or ninja is None:
        raise FileNotFoundError(missing())
    paths = [ROOT / "csrc/cuda" / name for name in kernel_sources()] if sources is None else sources
    paths = [path for path in paths if architectures_of(path.name, listed)]
    build.mkdir(parents=True, exist_ok=True)
    objects = {path.name: build / f"{path.name}.o" for path in paths}

    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "ninja_required_version = 1.3",
        f"builddir = {escaped(build)}",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  description = nvcc $in",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    first = {name: place for place, name in enumerate(LONGEST)}
    for path in sorted(paths, key=lambda path: first.get(path.name, len(first))):
        lines.append(f"build {escaped(objects[path.name])}: nvcc {escaped(path)}")
        lines.append("  nvcc = " + shlex.join(command(path, listed, nvcc, extra)).replace("$", "$$"))
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    # nvcc compiles a file's architectures in threads where there are more processors than files. By environment, so
    # that ninja does not take another number of processors for another command.
    threads = f"--threads={max(1, jobs // max(1, len(paths)))}"
    environment = os.environ | {"NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {threads}".strip()}
    subprocess.run(
        [ninja, "-f", str(build / "build.ninja"), "-j", str(jobs)],
        cwd=ROOT,
        env=environment,
        stdout=sys.stderr,
        check=True,
    )
    return objects


if __name__ == "__main__":
    why = missing()
    if why is not None:
        print(why)
        raise SystemExit(1)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0)
    compile_kernels(listed_architectures(find_nvcc() or ""))
