"""Lower bounds of the CUDA kernels' time on a Hopper GPU, counted without one.

    python tests/cuda_emulation/count.py [--only TEXT] [--json FILE]

The emulation counts what each kernel asks of memory, shared memory, the exponential units and the tensor cores; the
machine code tells how many instructions go with that (tests/cuda/loops.py). Each unit's rate is published; the kernel
cannot end before the busiest of its units. *These are counts, not measurements*: nothing is said of latency, of what
does not overlap, or of multiprocessors with less work than others.

Memory is that of a cold L2: what a kernel touches comes and goes once, whatever the kernel before has left there.

Attention is counted for two heads of one sequence and taken as often as the case has such pairs; the elementwise
kernels of gelu_ffn for 128 tokens, likewise. What each does is independent of the others, so that is exact, but for
what two blocks load twice at a border (sm90) and for lengths, weights and column sums, of a few KB. The rest is counted
in full.

The products of gelu_ffn: CUTLASS's for sm_80 is counted for two tiles, and taken as often as the product has such
pairs; its memory is that of each matrix once. Of CUTLASS's for Hopper, whose mainloop the emulation does not run, and
of torch's GEMM the counts are those of the arithmetic: what a tile multiplies, what TMA writes and wgmma reads (of
torch's, whose tiles nobody knows, no more than flops and matrices). Tiles come in whole numbers: what a
multiprocessor does is what the busiest does, and `waves` tells how much of all multiprocessors' time that leaves used.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests/cuda"), str(ROOT)]

import build  # noqa: E402
import loops  # noqa: E402
import ptxas  # noqa: E402

# NVIDIA H100 Tensor Core GPU Architecture (whitepaper), H100 SXM5: 132 multiprocessors; 989.4 TFLOP/s of bfloat16
# without sparsity; 66.9 TFLOP/s of float32, which are 128 multiply-adds a clock and multiprocessor at 1.98 GHz: the
# highest clock. Memory: the data sheets of H100 SXM (3.35 TB/s) and H200 (4.8 TB/s). By multiprocessor and clock (CUDA
# C++ Programming Guide, compute capability 9.0): 4 instructions of warps, 16 results of special functions, 128 bytes of
# shared memory.
MULTIPROCESSORS, CLOCK, TENSOR = 132, 1.98e9, 989.4e12
MEMORY = {"H100": 3.35e12, "H200": 4.8e12}
SECTOR = 32

COUNTS = (  # as in emulation.h
    *("load_requests", "vector_load_requests", "load_sectors", "distinct_load_sectors"),
    *("store_requests", "store_sectors", "distinct_store_sectors"),
    *("shared_requests", "shared_wavefronts", "shared_conflicts", "bulk_wavefronts"),
    *("barrier_arrivals", "mbarrier_arrivals", "mbarrier_waits", "exponentials", "tensor_flops", "shuffles"),
)

# Kernel -> (source, opcode of its anchor, what of the counts is that anchor, in warps).
EXPONENTIAL, VECTOR = (r"MUFU\.EX2", "exponentials"), (r"LDG(STS)?\.E\..*128.*", "vector_load_requests")
ANCHORS = {
    "attention_forward_kernel": ("attention_forward.cu", *EXPONENTIAL),
    "attention_backward_kernel": ("attention_backward.cu", *EXPONENTIAL),
    "attention_sm90_forward_kernel": ("attention_sm90.cu", *EXPONENTIAL),
    "attention_sm90_grad_query_kernel": ("attention_backward_sm90.cu", *EXPONENTIAL),
    "attention_sm90_grad_key_kernel": ("attention_backward_sm90.cu", *EXPONENTIAL),
    "attention_sm90_grad_whole_kernel": ("attention_backward_whole_sm90.cu", *EXPONENTIAL),
    "layer_norm_forward_kernel": ("{op}.cu", *VECTOR),
    "layer_norm_backward_kernel": ("{op}.cu", *VECTOR),
    "gelu_forward_kernel": ("gelu_ffn_elementwise.cu", *VECTOR),
    "gelu_backward_kernel": ("gelu_ffn_elementwise.cu", *VECTOR),
    "fused_kernel": ("gelu_ffn_sm80.cu", r"HMMA\.16816.*", "tensor_flops"),
}
OF_A_WARP = {"exponentials": 32, "tensor_flops": 2 * 16 * 8 * 16}  # so many are one instruction of a warp


@dataclass
class Kernel:
    """One launch, or as many as the case takes of it. us: of each unit, by what it cannot do without. waves: the mean
    share of its work that a multiprocessor has while the busiest works; None: not known."""

    name: str
    counts: dict[str, int]
    instructions: int | None  # of warps; None: not known
    us: dict[str, float] = field(default_factory=dict)
    waves: float | None = None

    def bound(self, gpu: str) -> tuple[str, float]:
        """(the unit that binds, its microseconds)."""
        here = {unit: us for unit, us in self.us.items() if not unit.startswith("memory ") or unit.endswith(gpu)}
        return max(here.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class Product:
    """[rows, depth] times [depth, columns] in 16 bits, with an epilogue. tile: rows and columns of a block's; None: not
    known. reads, writes: matrices [rows, columns] that it reads, and writes."""

    rows: int
    columns: int
    depth: int
    tile: tuple[int, int] | None = None
    reads: int = 0
    writes: int = 1

    @property
    def tiles(self) -> int:
        assert self.tile is not None
        return -(-self.rows // self.tile[0]) * -(-self.columns // self.tile[1])

    @property
    def waves(self) -> float | None:
        return None if self.tile is None else self.tiles / (MULTIPROCESSORS * -(-self.tiles // MULTIPROCESSORS))

    def memory(self) -> dict[str, int]:
        """Sectors of each matrix once."""
        result = self.rows * self.columns
        loads = (self.rows + self.columns) * self.depth + self.reads * result
        sectors = {"distinct_load_sectors": loads, "distinct_store_sectors": self.writes * result}
        return {name: 2 * elements // SECTOR for name, elements in sectors.items()}

    def by_arithmetic(self) -> dict[str, int]:
        """What Hopper's kernel does: TMA writes each tile's operands, a warpgroup's wgmma of 64 rows reads both of its
        operands from shared memory. Of the epilogue, each matrix goes through shared memory once each way."""
        counts = dict.fromkeys(COUNTS, 0) | self.memory()
        if self.tile is None:
            return counts | {"tensor_flops": 2 * self.rows * self.columns * self.depth}
        rows, columns = self.tile
        operands = 2 * (rows + columns) * self.depth
        read = 2 * (rows + rows // 64 * columns) * self.depth
        epilogue = 2 * 2 * (self.reads + self.writes) * rows * columns
        counts["bulk_wavefronts"] = self.tiles * (operands + read + epilogue) // 128
        return counts | {"tensor_flops": 2 * self.tiles * rows * columns * self.depth}


@dataclass
class Case:
    """An op at a shape. times: how often the work that `run` has done fits in it. product: what its kernel
    `fused_kernel` does, of which alone the case is then; without `run`, all that is known of it."""

    name: str
    op: str
    times: int
    run: Callable[[], None] | None
    multiprocessors: int = MULTIPROCESSORS
    product: Product | None = None


def units(counts: dict[str, int], instructions: int | None, waves: float | None = None) -> dict[str, float]:
    """Microseconds that each unit of the whole GPU is busy at least; of the busiest multiprocessor's but for memory."""
    clocks = MULTIPROCESSORS * CLOCK / 1e6  # of all multiprocessors, in a microsecond
    sectors = counts["distinct_load_sectors"] + counts["distinct_store_sectors"]
    us = {f"memory {gpu}": sectors * SECTOR / rate * 1e6 for gpu, rate in MEMORY.items()}
    clocks *= waves or 1.0
    us["shared memory"] = (counts["shared_wavefronts"] + counts["bulk_wavefronts"]) / clocks
    us["exponentials"] = counts["exponentials"] / 16 / clocks
    us["tensor cores"] = counts["tensor_flops"] / TENSOR * 1e6 / (waves or 1.0)
    if instructions is not None:
        us["issue"] = instructions / 4 / clocks
    return us


# ------------------------------------------------------------------------------------------ machine code


@cache
def _functions(binary: Path) -> dict[str, dict[int, str]]:
    found = loops.functions(ptxas.disassemble(binary, "sm_90a"))
    return {_same_in_both(symbol): code for symbol, code in found.items()}


def _same_in_both(symbol: str) -> str:
    """nvcc gives an anonymous namespace a name of its own in each file."""
    while match := re.search(r"(\d+)(_GLOBAL__N__)", symbol):
        end = match.end(1) + int(match[1])
        symbol = f"{symbol[: match.start()]}12_GLOBAL__N_1{symbol[end:]}"
    return symbol


@cache
def machine_code() -> dict[str, Path]:
    """Source -> object for sm_90a; nothing where they cannot be compiled or read here."""
    if ptxas.disassembler() is None:
        return {}
    cuda_build = ptxas.load_cuda_build()
    if cuda_build.missing():
        return {}
    listed = cuda_build.parse_architectures("9.0a")
    names = {
        source.format(op=op) for source, *_ in ANCHORS.values() for op in ("add_layer_norm", "embedding_layer_norm")
    }
    sources = [ROOT / "csrc/cuda" / name for name in sorted(names)]
    return dict(cuda_build.compile_kernels(listed, cuda_build.BUILD.with_name("cuda-counted"), sources))


def instructions_of(symbol: str, op: str, counts: dict[str, int]) -> int | None:
    """Instructions of warps in the loop that a kernel spends its time in; None: the kernel is not in ANCHORS."""
    known = next((value for name, value in ANCHORS.items() if re.search(rf"\d{name}I", symbol)), None)
    if known is None:
        return None
    source, anchor, count = known
    binary = machine_code().get(source.format(op=op))
    if binary is None:
        return None
    turn = loops.turn(_functions(binary)[symbol], anchor)
    warps = counts[count] / OF_A_WARP.get(count, 1)
    return round(warps / turn.anchors * turn.instructions)


# ------------------------------------------------------------------------------------------ the emulation


class Emulation:
    """The counting library, which must be the process's cuda backend."""

    def __init__(self, built: Path) -> None:
        self.library = ctypes.CDLL(str(built))
        self.library.rk_emulation_take_counts.restype = ctypes.c_int64
        listed = subprocess.run(["nm", str(built)], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^([0-9a-f]+) \w (\S+)$", listed, re.MULTILINE)
        self.symbols = {int(address, 16): symbol for address, symbol in found}

    def count(self, case: Case) -> Iterator[tuple[str, dict[str, int]]]:
        """(symbol, counts) of each launch."""
        assert case.run is not None
        self.library.rk_emulation_set_device(90, case.multiprocessors)
        self.library.rk_emulation_set_counting(1)
        case.run()
        width, room = 1 + len(COUNTS), 64
        numbers = (ctypes.c_int64 * (width * room))()
        launches = self.library.rk_emulation_take_counts(numbers, ctypes.c_int64(room))
        assert launches <= room
        self.library.rk_emulation_set_counting(0)
        for i in range(launches):
            code, *values = numbers[i * width : (i + 1) * width]
            yield self.symbols[code], dict(zip(COUNTS, (value * case.times for value in values), strict=True))


def short(symbol: str) -> str:
    match = re.search(r"\d(\w+?_kernel)I?", symbol)
    return re.sub(r"^.*\d(?=[a-z])", "", match[1]) if match else symbol


def kernels_of(emulation: Emulation, case: Case) -> list[Kernel]:
    product = case.product
    if case.run is None:
        assert product is not None
        counts = product.by_arithmetic()
        return [Kernel("by arithmetic", counts, None, units(counts, None, product.waves), product.waves)]
    found = []
    for symbol, counted in emulation.count(case):
        if product is not None and "fused_kernel" not in symbol:
            continue
        counts, waves = counted, None
        if product is not None:
            assert counted["tensor_flops"] == product.by_arithmetic()["tensor_flops"], "another tile than the plan's"
            counts, waves = counted | product.memory(), product.waves
        instructions = instructions_of(symbol, case.op, counts)
        found.append(Kernel(short(symbol), counts, instructions, units(counts, instructions, waves), waves))
    return found


# ------------------------------------------------------------------------------------------ cases


def cases() -> list[Case]:
    import torch
    from torch import Tensor

    ops = torch.ops.roberta_kernels_cuda
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def attention(name: str, variant: str, batch: int, heads: int, length: int) -> Iterator[Case]:
        ends = torch.tensor([0, length], dtype=torch.int32)
        q, k, v = draw(length, 3, 2, 64).unbind(1)
        common = (ends, ends, length, length, 0.125, False, None, 0.0, None)
        kept: list[Tensor] = []

        def forward() -> None:
            ops.set_variant("attention", variant)
            kept[:] = ops.attention_forward(q, k, v, *common)

        def backward() -> None:
            if not kept:
                forward()
                emulated.library.rk_emulation_set_counting(1)
            ops.attention_backward(draw(length, 2, 64), q, k, v, *kept, *common)

        for direction, run in (("forward", forward), ("backward", backward)):
            yield Case(f"attention {variant} {name} {direction}", "attention", batch * heads // 2, run, 1)

    def add_layer_norm(name: str, rows: int, width: int) -> Iterator[Case]:
        x, residual, grad = (draw(rows, width) for _ in range(3))
        weight, bias, x_bias = (draw(width) for _ in range(3))
        mean, rstd = torch.zeros(rows), torch.ones(rows)
        forward = (x, residual, weight, bias, 1e-5, x_bias, 0.0, None)
        backward = (grad, x, residual, weight, x_bias, mean, rstd, 0.0, None)
        yield Case(f"add_layer_norm {name} forward", "add_layer_norm", 1, lambda: ops.add_layer_norm_forward(*forward))
        yield Case(
            f"add_layer_norm {name} backward", "add_layer_norm", 1, lambda: ops.add_layer_norm_backward(*backward)
        )

    def embedding_layer_norm(name: str, rows: int, width: int, types: int) -> Iterator[Case]:
        words, positions = 50265, 514
        ids = torch.randint(5, words, (rows,), generator=generator), torch.arange(rows) % 128 + 2
        ids += (torch.zeros(rows, dtype=torch.int64),)
        tables = draw(words, width), draw(positions, width), draw(types, width)
        weight, bias, grad = draw(width), draw(width), draw(rows, width)
        forward = (*ids, *tables, weight, bias, 1e-5, 1, 1, 0.0, None)
        backward = (grad, *ids, *tables, weight, torch.zeros(rows), torch.ones(rows), 1, 1, 0.0, None)
        op = "embedding_layer_norm"
        yield Case(f"{op} {name} forward", op, 1, lambda: ops.embedding_layer_norm_forward(*forward))
        yield Case(f"{op} {name} backward", op, 1, lambda: ops.embedding_layer_norm_backward(*backward))

    def gelu_ffn(name: str, tokens: int, width: int) -> Iterator[Case]:
        x, grad, pre = draw(128, width), draw(128, width), draw(128, 4 * width)
        w_in, w_out = draw(4 * width, width), draw(width, 4 * width)
        b_in, b_out = draw(4 * width), draw(width)
        for tanh in (False, True):
            form = "tanh" if tanh else "erf"
            forward = (x, w_in, b_in, w_out, b_out, tanh, False)
            backward = (grad, x, w_in, w_out, pre, tanh)
            where = f"gelu_ffn portable {form} {name}"
            yield Case(f"{where} forward", "gelu_ffn", tokens // 128, lambda f=forward: ops.gelu_ffn_forward(*f))
            yield Case(f"{where} backward", "gelu_ffn", tokens // 128, lambda b=backward: ops.gelu_ffn_backward(*b))

    def products(name: str, tokens: int, width: int) -> Iterator[Case]:
        """Of gelu_ffn: those that go through GELU in each variant, and the others, which are torch's."""
        inner, small = 4 * width, fused_tile(tokens, 4 * width) == (64, 128)
        for direction, saved in (("forward", 2), ("backward", 2)):
            backward = direction == "backward"
            like = Product(tokens, inner, width, None, int(backward), saved)
            tile80 = (128, 128) if backward or not small else (64, 64)
            where = f"gelu_ffn product, {name} {direction}"
            one = replace(like, tile=tile80)
            rows, columns = tile80[0], 2 * tile80[1]
            x, pre, grad = draw(rows, width), draw(rows, columns), draw(rows, width)
            w_in, b_in, w_out = draw(columns, width), draw(columns), draw(width, columns)

            def run(
                x: Any = x, pre: Any = pre, grad: Any = grad, w: Any = (w_in, b_in, w_out), b: Any = backward
            ) -> None:
                ops.set_variant("gelu_ffn", "sm80")
                if b:
                    ops.gelu_ffn_backward(grad, x, w[0], w[2], pre, False)
                else:
                    ops.gelu_ffn_forward(x, w[0], w[1], w[2], None, False, True)
                ops.set_variant("gelu_ffn", "portable")

            # As many multiprocessors as make the plan choose that tile for two of them.
            yield Case(f"{where}, sm80", "gelu_ffn", one.tiles // 2, run, 1 if tile80[0] == 128 else 132, one)
            tile90 = (128, 128) if backward or not small else (64, 128)
            yield Case(f"{where}, sm90", "gelu_ffn", 1, None, product=replace(like, tile=tile90))
            yield Case(f"{where}, torch's, without GELU", "gelu_ffn", 1, None, product=replace(like, reads=0, writes=1))
        yield Case(
            f"gelu_ffn product, {name} forward, second", "gelu_ffn", 1, None, product=Product(tokens, width, inner)
        )
        for what, sizes in (
            ("x", (tokens, width, inner)),
            ("w_in", (inner, width, tokens)),
            ("w_out", (width, inner, tokens)),
        ):
            case = f"gelu_ffn product, {name} backward, gradient of {what}"
            yield Case(case, "gelu_ffn", 1, None, product=Product(*sizes))

    emulated = Emulation(Path(os.environ["ROBERTA_KERNELS_CUDA_EMULATION"]))
    found: list[Case] = []
    for model, heads, width in (("base", 12, 768), ("large", 16, 1024)):
        for length in (128, 512):
            for variant in ("portable", "sm90"):
                found += attention(f"32x{length} {model}", variant, 32, heads, length)
        found += add_layer_norm(f"32x128 {model}", 4096, width)
        found += embedding_layer_norm(f"32x128 {model}", 4096, width, 1)
        found += embedding_layer_norm(f"32x128 {model}, two types", 4096, width, 2)
        found += gelu_ffn(f"32x128 {model}", 4096, width)
        found += products(f"8x128 {model}", 1024, width)
        found += products(f"32x128 {model}", 4096, width)
    return found


def fused_tile(tokens: int, inner: int) -> tuple[int, int]:
    """fused_forward_tile of csrc/cuda/gelu_ffn.h."""

    def each(rows: int) -> int:
        return -(-(-(-tokens // rows) * -(-inner // 128)) // MULTIPROCESSORS)

    return (128, 128) if 20 * each(128) <= 11 * each(64) else (64, 128)


def table(results: dict[str, list[Kernel]]) -> str:
    lines = []
    for name, kernels in results.items():
        total = {gpu: sum(kernel.bound(gpu)[1] for kernel in kernels) for gpu in MEMORY}
        lines.append(f"{name}: at least {total['H100']:.2f} us on an H100, {total['H200']:.2f} on an H200")
        for k in kernels:
            asked = (k.counts["load_sectors"] + k.counts["store_sectors"]) * SECTOR / 1e6
            moved = (k.counts["distinct_load_sectors"] + k.counts["distinct_store_sectors"]) * SECTOR / 1e6
            wavefronts = k.counts["shared_wavefronts"] + k.counts["bulk_wavefronts"]
            conflicts = k.counts["shared_conflicts"] / max(1, k.counts["shared_wavefronts"])
            waves = "" if k.waves is None else f"; waves {k.waves:.0%} full"
            lines.append(f"  {k.name}: binds {k.bound('H100')[0]} (H200: {k.bound('H200')[0]}){waves}")
            lines.append("    us: " + ", ".join(f"{unit} {us:.2f}" for unit, us in k.us.items()))
            lines.append(
                f"    {moved:.2f} MB of memory, {asked:.2f} MB asked of L2; {wavefronts} wavefronts of shared memory, "
                f"{conflicts:.0%} of them conflicts; {k.counts['barrier_arrivals'] // 32} waits of warps at barriers, "
                f"{k.counts['mbarrier_waits']} of threads at mbarriers"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--json", type=Path, help="write the counts there, too")
    options = parser.parse_args()
    built = build.library("counted")
    os.environ["ROBERTA_KERNELS_CUDA_EMULATION"] = str(built)
    import torch

    torch.ops.load_library(str(built))
    emulation, results = Emulation(built), {}
    for case in cases():
        if options.only in case.name:
            results[case.name] = kernels_of(emulation, case)
            print(table({case.name: results[case.name]}), flush=True)
    if not machine_code():
        print("(no issue slots: they need nvcc, cuobjdump and nvdisasm)")
    if options.json:
        found = {name: [asdict(k) for k in kernels] for name, kernels in results.items()}
        options.json.write_text(json.dumps({"counted": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
