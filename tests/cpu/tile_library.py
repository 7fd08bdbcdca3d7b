"""tile_library.cpp and tile_attention.cpp compiled for the tests, with the twins of the tile instructions or with the
instructions."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = ["-O2", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi", "-fPIC", f"-I{ROOT}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni", "-mfma"]


def build(folder: Path, compiler: str, twin: bool) -> Tiles:
    """Compiles tile_library.cpp into `folder` and loads it."""
    return Tiles(compiled("tile_library", folder, compiler, twin, avx512=not twin))


def compiled(source: str, folder: Path, compiler: str, twin: bool, avx512: bool) -> ctypes.CDLL:
    """A library of one source. avx512: vectors as "amx" has them, else portable ones."""
    name = f"{source}_{twin}_{avx512}"
    isa = [*(["-DRK_AMX_TWIN"] if twin else []), *([*AVX512, "-DRK_CPU_ISA_AVX512_BF16"] if avx512 else [])]
    kernels, threads, path = (folder / f"{name}{suffix}" for suffix in (".o", "_threads.o", ".so"))

    def run(*command):
        subprocess.run(command, check=True)

    isa += ["-DRK_CPU_ISA=amx", "-DRK_CPU_ISA_AMX"]
    run(compiler, *FLAGS, *isa, "-c", HERE / f"{source}.cpp", "-o", kernels)
    run(compiler, *FLAGS, "-c", HERE / "tile_threads.cpp", "-o", threads)
    run(compiler, "-shared", "-pthread", kernels, threads, "-o", path)
    library = ctypes.CDLL(str(path))
    if not twin:
        assert library.request_tiles() == 0
    return library


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def poisoned(*shape, dtype):
    """Room for a result, with a margin behind it: (result, margin)."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), torch.nan, dtype=dtype)
    return memory[:size].view(shape), memory[size:]


class TileAttention:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def threads(self, count: int) -> None:
        self.library.set_threads(count)

    def __call__(self, q, k, v, lengths_q, lengths_k=None, *, causal=False, key_mask=None, scale=None, parts=3):
        """(out, lse); q, k, v: [T, heads, head_dim], unit stride in head_dim."""
        starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k or lengths_q)]
        tokens, heads, head_dim = q.shape
        out, margin = poisoned(tokens, heads, head_dim, dtype=q.dtype)
        lse, lse_margin = poisoned(heads, tokens, dtype=torch.float32)
        self.library.set_parts(parts)
        self.library.tile_attention(
            q.dtype == torch.bfloat16,
            causal,
            ctypes.c_float(head_dim**-0.5 if scale is None else scale),
            numbers(len(lengths_q), heads, head_dim, tokens),
            numbers(*(stride for t in (q, k, v) for stride in t.stride()[:2])),
            pointers([q, k, v, *starts, key_mask, out, lse]),
        )
        assert margin.isnan().all(), "written past the end"
        assert lse_margin.isnan().all(), "written past the end"
        return out, lse

    def backward(
        self, grad_out, q, k, v, lse, lengths_q, lengths_k=None, *, causal=False, key_mask=None, dropout_p=0.0, seed=0
    ):
        """(grad_q, grad_k, grad_v); lse: float32 [heads, Tq], of the forward."""
        starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k or lengths_q)]
        tokens, heads, head_dim = q.shape
        grads, margins = zip(*(poisoned(*t.shape, dtype=t.dtype) for t in (q, k, v)), strict=True)
        self.library.tile_attention_backward(
            q.dtype == torch.bfloat16,
            causal,
            ctypes.c_float(head_dim**-0.5),
            ctypes.c_double(dropout_p),
            ctypes.c_int64(seed),
            numbers(len(lengths_q), heads, head_dim, tokens),
            numbers(*(stride for t in (q, k, v, grad_out) for stride in t.stride()[:2])),
            pointers([q, k, v, *starts, key_mask, grad_out, lse, *grads]),
        )
        assert all(margin.isnan().all() for margin in margins), "written past the end"
        return grads


class Tiles:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def threads(self, count: int) -> None:
        self.library.set_threads(count)

    def dot(self, a, b, c):
        """c + a b of three tiles of 1024 bytes; a uint8 and b int8, or both bfloat16."""
        result = c.clone()
        self.library.tile_dot(a.dtype == torch.uint8, address(a), address(b), address(result))
        return result

    def project(self, x, weights, biases=None, parts=3):
        """[tokens, sum of rows]: x (w_0 | w_1 | w_2)^T + biases."""
        tokens, k_size = x.shape
        out, margin = poisoned(tokens, sum(w.shape[0] for w in weights), dtype=x.dtype)
        self.library.tile_project(
            x.dtype == torch.bfloat16,
            parts,
            len(weights),
            numbers(tokens, k_size, *(w.shape[0] for w in weights)),
            ctypes.c_int64(weights[0].stride(0)),
            pointers(weights),
            pointers(biases or [None] * len(weights)),
            address(x),
            address(out),
        )
        assert margin.isnan().all(), "written past the end"
        return out

    def whole(self, x, w):
        """[rows, N]: x w^T, of both rounded to integers."""
        out, margin = poisoned(x.shape[0], w.shape[0], dtype=torch.float32)
        self.library.tile_whole(numbers(*x.shape, w.shape[0]), address(x), address(w), address(out))
        assert margin.isnan().all(), "written past the end"
        return out

    def feed_forward(self, x, w_in, b_in, w_out, b_out, tanh=False, parts=3, save=False):
        """(out, pre-activation or None)"""
        (tokens, hidden), inner, outer = x.shape, w_in.shape[0], w_out.shape[0]
        out, margin = poisoned(tokens, outer, dtype=x.dtype)
        saved = poisoned(tokens, inner, dtype=x.dtype)[0] if save else None
        operands = (x, w_in, b_in, w_out, b_out, out, saved)
        sizes = numbers(tokens, hidden, inner, outer)
        self.library.tile_feed_forward(x.dtype == torch.bfloat16, parts, tanh, sizes, *map(address, operands))
        assert margin.isnan().all(), "written past the end"
        return out, saved

    def backward(self, grad_out, x, w_in, w_out, preactivation, tanh=False):
        """Gradients of x, w_in, b_in, w_out, b_out."""
        (tokens, hidden), inner, outer = x.shape, w_in.shape[0], w_out.shape[0]
        shapes = (
            (tokens, inner),
            (tokens, inner),
            (tokens, hidden),
            (inner, hidden),
            (inner,),
            (outer, inner),
            (outer,),
        )
        results = [poisoned(*shape, dtype=x.dtype) for shape in shapes]
        tensors = pointers([grad_out, x, w_in, w_out, preactivation, *(result for result, _ in results)])
        self.library.tile_backward(x.dtype == torch.bfloat16, tanh, numbers(tokens, hidden, inner, outer), tensors)
        assert all(margin.isnan().all() for _, margin in results), "written past the end"
        return [result for result, _ in results[2:]]
