"""What the compiled CUDA kernels use of a multiprocessor: registers, shared memory, spills, tensor cores.

python tests/cuda/ptxas.py [--json FILE]        # compiles csrc/cuda where it is out of date, prints the table
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_cuda_build() -> ModuleType:
    """csrc/cuda/cuda_build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/cuda_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Usage:
    """One function on one architecture, as ptxas reports it."""

    source: str
    architecture: str  # "sm_90a"
    symbol: str
    name: str  # demangled
    is_kernel: bool  # else: a device function that was not inlined
    registers: int = 0
    shared_bytes: int = 0  # static
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.source} {self.architecture} {self.name}: {self.registers} registers, {self.shared_bytes} B shared, "
            f"{self.stack_bytes} B stack, spills {self.spill_store_bytes} B stored, {self.spill_load_bytes} B loaded"
        )


def demangle(symbols: Iterable[str]) -> dict[str, str]:
    symbols = list(dict.fromkeys(symbols))
    if shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in symbols}
    text = "\n".join(symbols) + "\n"
    lines = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(symbols, lines, strict=True))


def parse(log: str, source: str) -> list[Usage]:
    """The report of `nvcc -Xptxas -v`, one Usage for each function and architecture."""
    found: list[dict[str, object]] = []
    architecture = kernel = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, architecture = match[1], match[2]
        elif match := re.search(r"Function properties for '?([^\s']+)", line):
            found.append({"symbol": match[1], "architecture": architecture, "is_kernel": match[1] == kernel})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            found[-1] |= {"stack_bytes": stack, "spill_store_bytes": stores, "spill_load_bytes": loads}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            entry = next(one for one in reversed(found) if one["symbol"] == kernel)
            entry |= {"registers": int(match[1]), "shared_bytes": int(shared[1]) if shared else 0}
    names = demangle(str(one["symbol"]) for one in found)
    return [Usage(source=source, name=names[str(one["symbol"])], **one) for one in found]  # type: ignore[arg-type]


def complaints(log: str) -> list[str]:
    """Warnings, and what ptxas calls a loss of performance (products of a warpgroup one after the other, say)."""
    return [line for line in log.splitlines() if re.search(r"warning|Performance Loss", line, re.IGNORECASE)]


def disassembler() -> tuple[Path, Path] | None:
    """(cuobjdump, nvdisasm): of PATH, else those that the triton package carries."""
    places = os.environ.get("PATH", "").split(os.pathsep)
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        places.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    for place in places:
        tools = Path(place, "cuobjdump"), Path(place, "nvdisasm")
        if all(os.access(tool, os.X_OK) for tool in tools):
            return tools
    return None


def disassemble(binary: Path, architecture: str) -> str:
    """What cuobjdump says of an object's code for the architecture."""
    tools = disassembler()
    assert tools is not None
    environment = os.environ | {"PATH": f"{tools[0].parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(
        [tools[0], "-sass", "-arch", architecture, binary], capture_output=True, text=True, check=True, env=environment
    ).stdout


def registers_after(binary: Path, architecture: str, opcode: str) -> dict[str, int]:
    """Symbol -> the highest register in what can run after an instruction of that name, where there is one."""
    highest: dict[str, int] = {}
    for function in disassemble(binary, architecture).split("Function : ")[1:]:
        found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", function, re.MULTILINE)
        code = {int(address, 16): instruction for address, instruction in found}
        following = dict(itertools.pairwise(code))
        reached: set[int] = set()
        reach = [following[address] for address, instruction in code.items() if opcode in instruction]
        while reach:
            address = reach.pop()
            if address in reached or address not in code:
                continue
            reached.add(address)
            instruction = code[address]
            if jump := re.search(r"\b(BRA|CALL|BSSY)\b.*?(0x[0-9a-f]+)", instruction):
                reach.append(int(jump[2], 16))
            ends = re.match(r"(BRA|EXIT|RET)\b", instruction) and not re.search(r"\bU?P\d", instruction)
            if not ends and address in following:
                reach.append(following[address])
        if reached:
            registers = [int(number) for address in reached for number in re.findall(r"\bR(\d+)\b", code[address])]
            highest[function.split()[0]] = max(registers, default=0)
    return highest


def count_instructions(binary: Path, architecture: str, opcode: str) -> dict[str, int]:
    """Symbol -> how many instructions of that name (HMMA, HGMMA) its code for the architecture has."""
    counts: dict[str, int] = {}
    symbol = ""
    for line in disassemble(binary, architecture).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
            counts.setdefault(symbol, 0)
        elif re.search(rf"\s{opcode}[.\s]", line):
            counts[symbol] += 1
    return counts


def table(usages: list[Usage]) -> str:
    """One line for each kernel: registers on each architecture, static shared memory, spilled bytes."""
    architectures = sorted({u.architecture for u in usages}, key=lambda name: int(re.sub(r"\D", "", name)))
    kernels: dict[tuple[str, str], dict[str, Usage]] = {}
    for u in usages:
        kernels.setdefault((u.source, u.name), {})[u.architecture] = u
    head = "".join(f"{a:>8}" for a in architectures)
    lines = [f"{'registers:':<12}{head}{'shared':>8}{'stack':>7}{'spills':>8}"]
    source = None
    for (where, name), on in sorted(kernels.items()):
        if where != source:
            source = where
            lines.append(where)
        registers = "".join(f"{on[a].registers if a in on else '-':>8}" for a in architectures)
        worst = [
            max(f(u) for u in on.values())
            for f in (
                lambda u: u.shared_bytes,
                lambda u: u.stack_bytes,
                lambda u: u.spill_store_bytes + u.spill_load_bytes,
            )
        ]
        short = re.sub(r"\brk::cuda::(\(anonymous namespace\)::)?|^void ", "", name)
        short = re.sub(r"\((?!anonymous|__nv|int|bool|float).*$", "", short) if len(short) > 90 else short
        lines.append(f"{'':<12}{registers}{worst[0]:>8}{worst[1]:>7}{worst[2]:>8}  {short[:110]}")
    return "\n".join(lines)


def compile_and_parse() -> tuple[list[Usage], dict[str, Path], dict[str, str]]:
    """(what everything in csrc/cuda uses, source -> object, source -> what nvcc said)."""
    build = load_cuda_build()
    listed = build.listed_architectures(build.find_nvcc() or "")
    objects = build.compile_kernels(listed, build.build_folder(listed))
    logs = {source: Path(f"{binary}.log").read_text() for source, binary in objects.items()}
    return [usage for source, log in logs.items() for usage in parse(log, source)], objects, logs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    everything, _, _ = compile_and_parse()
    print(table(everything))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(u) for u in everything], indent=1) + "\n")
