"""Every Triton kernel, compiled (not run) for A100, H100 and B200: no GPU is needed for that.

The launchers are called with tensors on the meta device while the kernels' `run` is replaced by one that notes the
launch; each launch is then compiled for the target exactly as a GPU of that kind would have compiled it. So the
configurations that are checked here are the ones that run. It takes a process without Triton's interpreter, one
for each architecture:

    python tests/triton/test_compile.py 90        # prints what each kernel uses, as JSON lines
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.full  # minutes of compiling

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# What one block may use: CUDA C++ Programming Guide, table of technical specifications per compute capability. An
# A100 has 163 KiB, but its tiles are also for the GPUs of its kind that have 99.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

Launch = Callable[[], object]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seed_for(dropout_p: float) -> torch.Tensor | None:
    return empty(1, dtype=torch.int64) if dropout_p > 0 else None


def attention(
    head_dim: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    *,
    causal: bool = False,
    masked: bool = False,
    bias: bool = False,
    tokens: int = 4096,
    sequences: int = 8,
    max_seqlen: int = 512,
    heads: int = 12,
) -> Launch:
    from roberta_kernels.triton import KERNELS

    q, k, v = empty(tokens, 3, heads, head_dim, dtype=dtype).unbind(1)
    out = empty(tokens, heads, head_dim, dtype=dtype)
    lse = empty(heads, tokens, dtype=torch.float32)
    cu_seqlens = empty(sequences + 1, dtype=torch.int32)
    key_mask = empty(tokens, dtype=torch.bool) if masked else None
    on_scores = empty(heads, max_seqlen, max_seqlen, dtype=dtype) if bias else None
    rest = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, head_dim**-0.5, causal, key_mask, dropout_p)

    def launch() -> None:
        KERNELS["attention_forward"](q, k, v, *rest, seed_for(dropout_p), on_scores)
        KERNELS["attention_backward"](out, q, k, v, out, lse, *rest, seed_for(dropout_p), on_scores)

    return launch


def add_layer_norm(width: int, dtype: torch.dtype, dropout_p: float = 0.0, *, tokens: int = 4096) -> Launch:
    from roberta_kernels.triton import KERNELS

    x, weight, mean = empty(tokens, width, dtype=dtype), empty(width, dtype=dtype), empty(tokens, dtype=torch.float32)

    def launch() -> None:
        seed = seed_for(dropout_p)
        KERNELS["add_layer_norm_forward"](x, x, weight, weight, 1e-5, weight, dropout_p, seed)
        KERNELS["add_layer_norm_backward"](x, x, x, weight, weight, mean, mean, dropout_p, seed)

    return launch


def gelu_ffn(hidden: int, inner: int, dtype: torch.dtype, *, tanh: bool = False, tokens: int = 16384) -> Launch:
    from roberta_kernels.triton import KERNELS

    x, pre = empty(tokens, hidden, dtype=dtype), empty(tokens, inner, dtype=dtype)
    w_in, w_out = empty(inner, hidden, dtype=dtype), empty(hidden, inner, dtype=dtype)
    b_in, b_out = empty(inner, dtype=dtype), empty(hidden, dtype=dtype)

    def launch() -> None:
        KERNELS["gelu_ffn_forward"](x, w_in, b_in, w_out, b_out, tanh, True)
        KERNELS["gelu_ffn_backward"](x, x, w_in, w_out, pre, tanh)

    return launch


def embedding_layer_norm(
    width: int, dtype: torch.dtype, dropout_p: float = 0.0, *, types: int = 1, tokens: int = 4096
) -> Launch:
    from roberta_kernels.triton import KERNELS

    ids, mean = empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.float32)
    tables = [empty(rows, width, dtype=dtype) for rows in (50265, 514, types)]
    weight, out = empty(width, dtype=dtype), empty(tokens, width, dtype=dtype)
    rest = (1, 1, dropout_p)

    def launch() -> None:
        seed = seed_for(dropout_p)
        KERNELS["embedding_layer_norm_forward"](ids, ids, ids, *tables, weight, weight, 1e-5, *rest, seed)
        KERNELS["embedding_layer_norm_backward"](out, ids, ids, ids, *tables, weight, mean, mean, *rest, seed)

    return launch


def linear_cross_entropy(hidden: int, words: int, dtype: torch.dtype, *, bias: bool = True, rows: int = 307) -> Launch:
    from roberta_kernels.triton import KERNELS

    x, weight = empty(rows, hidden, dtype=dtype), empty(words, hidden, dtype=dtype)
    of_words = empty(words, dtype=dtype) if bias else None
    labels, loss = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.float32)

    def launch() -> None:
        KERNELS["linear_cross_entropy_forward"](x, weight, of_words, labels, -100)
        statistics = empty(2, rows, dtype=torch.float32)
        KERNELS["linear_cross_entropy_backward"](loss, x, weight, of_words, labels, statistics, -100, True)

    return launch


def linear_log1p_max(hidden: int, words: int, dtype: torch.dtype, *, bias: bool = True, rows: int = 307) -> Launch:
    from roberta_kernels.triton import KERNELS

    x, weight = empty(rows, hidden, dtype=dtype), empty(words, hidden, dtype=dtype)
    of_words = empty(words, dtype=dtype) if bias else None

    def launch() -> None:
        KERNELS["linear_log1p_max_forward"](x, weight, of_words, empty(8, dtype=torch.int32))
        out, rows_of = empty(7, words, dtype=torch.float32), empty(7, words, dtype=torch.int32)
        KERNELS["linear_log1p_max_backward"](out, x, weight, of_words, out, rows_of, True)

    return launch


def cases() -> dict[str, Launch]:
    """What is compiled: every kernel, with the sizes of base and large models and the widest options."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "attention 64 bf16": attention(64, bf16),
        "attention 64 bf16 dropout": attention(64, bf16, 0.1),
        "attention 64 bf16 dropout short": attention(64, bf16, 0.1, max_seqlen=64),
        "attention 128 bf16": attention(128, bf16),
        "attention 80 fp16 dropout causal masked": attention(80, fp16, 0.1, causal=True, masked=True),
        "attention 64 fp32 dropout": attention(64, fp32, 0.1),
        "attention 64 bf16 bias": attention(64, bf16, bias=True),
        "attention 64 bf16 bias dropout masked": attention(64, bf16, 0.1, masked=True, bias=True),
        "attention 128 fp16 bias": attention(128, fp16, bias=True),
        "attention 64 fp32 bias": attention(64, fp32, bias=True),
        "add_layer_norm 768 bf16 dropout": add_layer_norm(768, bf16, 0.1),
        "add_layer_norm 1024 fp32": add_layer_norm(1024, fp32),
        "add_layer_norm 4096 fp16 dropout": add_layer_norm(4096, fp16, 0.1),
        "gelu_ffn 768 bf16": gelu_ffn(768, 3072, bf16),
        "gelu_ffn 1024 fp16 tanh few tokens": gelu_ffn(1024, 4096, fp16, tanh=True, tokens=256),
        "gelu_ffn 768 bf16 fewest tokens": gelu_ffn(768, 3072, bf16, tokens=16),
        "gelu_ffn 768 fp32": gelu_ffn(768, 3072, fp32),
        "embedding_layer_norm 768 bf16 dropout": embedding_layer_norm(768, bf16, 0.1),
        "embedding_layer_norm 1024 fp32 two types": embedding_layer_norm(1024, fp32, types=2),
        "linear_cross_entropy 50265 bf16": linear_cross_entropy(768, 50265, bf16),
        "linear_cross_entropy 250002 fp16 no bias": linear_cross_entropy(768, 250002, fp16, bias=False),
        "linear_cross_entropy 30522 fp32": linear_cross_entropy(1024, 30522, fp32),
        "linear_log1p_max 30522 bf16": linear_log1p_max(768, 30522, bf16),
        "linear_log1p_max 50265 fp32 no bias": linear_log1p_max(768, 50265, fp32, bias=False),
    }


# On Hopper all of these; on the others those that take most registers and memory, and every kernel.
WIDEST = (
    "attention 64 bf16 dropout",
    "attention 64 fp32 dropout",
    "attention 64 fp32 bias",
    "attention 80 fp16 dropout causal masked",
    "attention 128 fp16 bias",
    "add_layer_norm 4096 fp16 dropout",
    "gelu_ffn 768 bf16",
    "gelu_ffn 768 bf16 fewest tokens",
    "gelu_ffn 768 fp32",
    "embedding_layer_norm 768 bf16 dropout",
    "linear_cross_entropy 50265 bf16",
    "linear_log1p_max 30522 bf16",
)


# Launches that may not differ in what is compiled: the same model with other lengths, batches and token counts.
def same_keys() -> dict[str, list[Launch]]:
    bf16 = torch.bfloat16
    sizes = ((100, 1, 100), (65, 1, 65), (4097, 33, 512), (16384, 32, 512), (8192, 1, 8192))
    short_sizes = ((1, 1, 1), (17, 2, 16), (640, 10, 64), (63, 1, 63))
    return {
        "attention": [
            attention(64, bf16, 0.1, tokens=t, sequences=b, max_seqlen=s, masked=True, causal=True) for t, b, s in sizes
        ],
        "attention short": [attention(64, bf16, 0.1, tokens=t, sequences=b, max_seqlen=s) for t, b, s in short_sizes],
        "attention bias": [attention(64, bf16, tokens=t, sequences=b, max_seqlen=s, bias=True) for t, b, s in sizes],
        "attention one head": [attention(24, bf16, tokens=t, sequences=b, max_seqlen=s, heads=1) for t, b, s in sizes],
        "add_layer_norm": [
            add_layer_norm(768, bf16, p, tokens=t) for t, p in ((1, 0.1), (7, 0.9), (16, 0.1), (4096, 0.5))
        ],
        "gelu_ffn": [gelu_ffn(768, 3072, bf16, tokens=t) for t in (16384, 20000, 8191)],
        "gelu_ffn fewest": [gelu_ffn(768, 3072, bf16, tokens=t) for t in (1, 16, 37, 64)],
        "linear_cross_entropy": [linear_cross_entropy(768, 50265, bf16, rows=r) for r in (307, 1, 16, 4096, 20001)],
        "linear_log1p_max": [linear_log1p_max(768, 30522, bf16, rows=r) for r in (307, 1, 16, 4096, 20001)],
        "embedding_layer_norm": [embedding_layer_norm(768, bf16, 0.1, tokens=t) for t in (65, 128, 16384)],
    }


def record(architecture: int, launch: Launch) -> tuple[Any, list[tuple[Any, ...]]]:
    """(the target, every kernel launch that `launch` makes on such a GPU)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from roberta_kernels.triton import device

    device.capability = lambda _: architecture
    device.multiprocessors = lambda _: MULTIPROCESSORS[architecture]
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    launches = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options |= {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*args, **options)
        launches.append((kernel, backend, options, bound, specialization, rest))

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    finally:
        JITFunction.run = original
    return target, launches


def compile_launches(architecture: int) -> Iterator[dict[str, Any]]:
    import triton
    from triton.compiler import ASTSource

    seen = set()
    for case, launch in cases().items():
        if architecture != 90 and case not in WIDEST:
            continue
        target, launches = record(architecture, launch)
        for kernel, backend, options, bound, specialization, rest in launches:
            key = (kernel.__name__, str(specialization), str(rest))
            if key in seen:
                continue
            seen.add(key)
            parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=target, options=parsed.__dict__)
            ptx = compiled.asm["ptx"]
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                tool = triton.knobs.nvidia.cuobjdump.path
                usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
            used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
            yield {
                "case": case,
                "kernel": kernel.__name__,
                "registers": used["REG"],
                "spilled_bytes": used["STACK"] + used["LOCAL"],
                "shared_bytes": compiled.metadata.shared,
                "warps": compiled.metadata.num_warps,
                "wgmma": "wgmma.mma_async" in ptx,
                "tcgen05": "tcgen05.mma" in ptx,
                "asynchronous_16_byte_copies": len(re.findall(r"cp\.async\.cg[^;]*0x10", ptx)),
                "vector_loads": len(re.findall(r"ld\.global\.v[24]", ptx)),
            }


def launch_keys() -> dict[str, list[list[str]]]:
    """For each group of same_keys and each of its launches, what Triton would look its compiled kernels up by."""
    return {
        group: [
            sorted({f"{kernel.__name__} {spec} {rest}" for kernel, _, _, _, spec, rest in record(90, launch)[1]})
            for launch in launches
        ]
        for group, launches in same_keys().items()
    }


def start(argument: str, cache: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, argument],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[Any]:
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-4000:]
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Architecture -> what each kernel uses. All architectures are compiled at the same time."""
    cache = tmp_path_factory.mktemp("triton_cache")
    processes = {architecture: start(str(architecture), cache) for architecture in ARCHITECTURES}
    return {architecture: finish(process) for architecture, process in processes.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(compiled: dict[int, list[dict[str, Any]]], architecture: int) -> None:
    kernels = compiled[architecture]
    for k in kernels:
        print(f"sm_{architecture} {k['case']}: {k['kernel']}: {k['registers']} registers, {k['shared_bytes']} B shared")
    spilling = [f"{k['case']}: {k['kernel']} spills {k['spilled_bytes']} B" for k in kernels if k["spilled_bytes"]]
    assert len(kernels) >= (50 if architecture == 90 else 35)
    assert {k["kernel"] for k in kernels} == {k["kernel"] for k in compiled[90]}
    assert {k["case"] for k in kernels} >= set(WIDEST)
    assert not spilling, "\n".join(spilling)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_fit_shared_memory(compiled: dict[int, list[dict[str, Any]]], architecture: int) -> None:
    limit = SHARED_MEMORY[architecture]
    assert not [k for k in compiled[architecture] if k["shared_bytes"] > limit]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_are_copied_16_bytes_at_a_time(compiled: dict[int, list[dict[str, Any]]], architecture: int) -> None:
    """Also where q, k and v are views of one projection, with strides that no compilation is keyed on."""
    for k in compiled[architecture]:
        # linear_log1p_max's backward writes one number somewhere for each that it reads.
        if "fp32" in k["case"] or re.search("delta|partials|pieces|log1p_max_backward", k["kernel"]):
            continue
        if re.match("attention|gelu_ffn", k["kernel"]) and "grad_bias" not in k["kernel"]:  # which is not pipelined
            assert k["asynchronous_16_byte_copies"] > 0, k
        else:
            assert k["vector_loads"] > 0, k


def test_hopper_multiplies_with_wgmma(compiled: dict[int, list[dict[str, Any]]]) -> None:
    products = [
        k
        for k in compiled[90]
        if re.match(r"(attention_(forward|grad)|gelu_ffn_)", k["kernel"]) and "fp32" not in k["case"]
    ]
    assert {k["kernel"] for k in products} >= {"attention_forward_kernel", "gelu_ffn_forward_kernel"}
    assert all(k["wgmma"] for k in products), [k for k in products if not k["wgmma"]]


def test_blackwell_multiplies_with_tcgen05(compiled: dict[int, list[dict[str, Any]]]) -> None:
    products = [k for k in compiled[100] if k["kernel"].startswith("gelu_ffn_") and "fp32" not in k["case"]]
    assert products
    assert all(k["tcgen05"] for k in products)


def test_one_compilation_is_enough_for_every_length(tmp_path: Path) -> None:
    (groups,) = finish(start("keys", tmp_path))
    assert len(groups) >= 7
    for group, keys in groups.items():
        assert keys[0], group
        for other in keys[1:]:
            assert other == keys[0], group


if __name__ == "__main__":
    if sys.argv[1] == "keys":
        print(json.dumps(launch_keys()))
    else:
        for result in compile_launches(int(sys.argv[1])):
            print(json.dumps(result), flush=True)
