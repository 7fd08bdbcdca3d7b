"""Sample calls of every op: of the public functions, and of the ops that are registered below them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends, ops, triton

from .cases import Draw, Served, cumulative


@dataclass
class Sample:
    """One call of a public op: function(**tensors, **rest); `tensors` are what has a gradient."""

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    rest: dict[str, Any]

    @property
    def op(self) -> str:
        return self.function.__name__

    def __call__(self, **tensors: Tensor) -> Tensor:
        return self.function(**{**self.tensors, **tensors}, **self.rest)


def _attention(draw: Draw, dtype: torch.dtype, tokens: int, *, every_option: bool) -> Sample:
    lengths = [tokens // 3, tokens - tokens // 3]
    # In Triton's interpreter every head takes seconds, and test_attention.py has cases of many.
    heads = 1 if backends.current_backend() == "triton" and triton.interpreting() else 2
    if every_option:
        lengths_k = [tokens // 2, tokens // 2 + 4]  # not as many as queries: torch.compile takes equal sizes for one
        q = draw.normal(tokens, heads, 16, dtype=dtype)
        k, v = (draw.normal(sum(lengths_k), heads, 16, dtype=dtype) for _ in range(2))
        key_mask = draw.bools(sum(lengths_k), p=0.8)
        key_mask[0] = True
        rest = {
            "cu_seqlens_q": cumulative(lengths, draw.device),
            "cu_seqlens_k": cumulative(lengths_k, draw.device),
            "max_seqlen_q": max(lengths),
            "max_seqlen_k": max(lengths_k),
            "scale": 0.3,
            "causal": True,
            "key_mask": key_mask,
            "dropout_p": 0.25,
            "seed": draw.seed(),
        }
        tensors = {"q": q, "k": k, "v": v}
        if backends.current_backend() != "cuda":  # which takes none
            tensors["bias"] = draw.normal(heads, max(lengths), max(lengths_k), dtype=dtype)
        return Sample(ops.attention, tensors, rest)
    q, k, v = draw.normal(tokens, 3, heads, 16, dtype=dtype).unbind(1)
    rest = {"cu_seqlens_q": cumulative(lengths, draw.device), "max_seqlen_q": max(lengths, default=0)}
    return Sample(ops.attention, {"q": q, "k": k, "v": v}, rest)


def _add_layer_norm(draw: Draw, dtype: torch.dtype, tokens: int, *, every_option: bool) -> Sample:
    tensors = {name: draw.normal(tokens, 24, dtype=dtype) for name in ("x", "residual")}
    tensors |= {name: draw.normal(24, dtype=dtype) for name in ("weight", "bias")}
    rest: dict[str, Any] = {"eps": 1e-5}
    if every_option:
        tensors["x_bias"] = draw.normal(24, dtype=dtype)
        rest |= {"dropout_p": 0.25, "seed": draw.seed()}
    return Sample(ops.add_layer_norm, tensors, rest)


def _gelu_ffn(draw: Draw, dtype: torch.dtype, tokens: int, *, every_option: bool) -> Sample:
    tensors = {
        "x": draw.normal(tokens, 16, dtype=dtype),
        "w_in": draw.normal(24, 16, dtype=dtype, std=0.25),
        "b_in": draw.normal(24, dtype=dtype),
        "w_out": draw.normal(17, 24, dtype=dtype, std=0.25),
    }
    if every_option:
        tensors["b_out"] = draw.normal(17, dtype=dtype)
    return Sample(ops.gelu_ffn, tensors, {"approximate": "tanh" if every_option else "none"})


def _embedding_layer_norm(draw: Draw, dtype: torch.dtype, tokens: int, *, every_option: bool) -> Sample:
    tensors = {
        "word_embeddings": draw.normal(11, 24, dtype=dtype),
        "position_embeddings": draw.normal(13, 24, dtype=dtype),
        "token_type_embeddings": draw.normal(2, 24, dtype=dtype),
        "weight": draw.normal(24, dtype=dtype),
        "bias": draw.normal(24, dtype=dtype),
    }
    rest: dict[str, Any] = {
        "input_ids": draw.integers(0, 11, tokens),
        "position_ids": draw.integers(0, 13, tokens),
        "token_type_ids": draw.integers(0, 2, tokens) if every_option else None,
        "eps": 1e-5,
    }
    if every_option:
        rest |= {"word_padding_idx": 1, "position_padding_idx": 1, "dropout_p": 0.25, "seed": draw.seed()}
    return Sample(ops.embedding_layer_norm, tensors, rest)


def _linear_cross_entropy(draw: Draw, dtype: torch.dtype, tokens: int, *, every_option: bool) -> Sample:
    tensors = {"x": draw.normal(tokens, 24, dtype=dtype), "weight": draw.normal(37, 24, dtype=dtype, std=0.3)}
    labels = draw.integers(0, 37, tokens)
    rest: dict[str, Any] = {"labels": labels}
    if every_option:
        tensors["bias"] = draw.normal(37, dtype=dtype)
        labels[::3] = -1
        rest |= {"ignore_index": -1, "reduction": "none"}
    return Sample(ops.linear_cross_entropy, tensors, rest)


def _linear_log1p_max(draw: Draw, dtype: torch.dtype, tokens: int, *, every_option: bool) -> Sample:
    # No rounding changes which row has the largest logit of a word, or whether that is above zero: rows grow from one
    # to the next, and a word is of one sign.
    x = (draw.normal(1, 24, dtype=dtype).abs() + 0.1) * torch.arange(1, tokens + 1, device=draw.device)[:, None]
    weight = draw.normal(37, 24, dtype=dtype, std=0.3).abs()
    weight[::4] *= -1.0
    tensors = {"x": (x * (1.0 + 0.1 * draw.normal(tokens, 24, dtype=dtype))).to(dtype), "weight": weight}
    if every_option:
        tensors["bias"] = draw.normal(37, dtype=dtype, std=0.3)
    ends = cumulative([tokens // 3, 0, tokens - tokens // 3], draw.device)
    return Sample(ops.linear_log1p_max, tensors, {"cu_seqlens": ends})


MAKERS = {
    "attention": _attention,
    "add_layer_norm": _add_layer_norm,
    "gelu_ffn": _gelu_ffn,
    "embedding_layer_norm": _embedding_layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_log1p_max": _linear_log1p_max,
}
OPS = tuple(MAKERS)


def sample(op: str, draw: Draw, dtype: torch.dtype, *, tokens: int = 9, every_option: bool = False) -> Sample:
    """A call of a public op: as plain as can be, or with every option."""
    return MAKERS[op](draw, dtype, tokens, every_option=every_option)


def registered_calls(served: Served, call: Sample, draw: Draw) -> dict[str, tuple[Any, ...]]:
    """{"<op>_forward": its arguments, "<op>_backward": ...}, as the public function and autograd pass them."""
    kernels = served.kernels()
    t, rest = call.tensors, call.rest
    dropout = (rest.get("dropout_p", 0.0), rest.get("seed"))
    if call.op == "attention":
        ends = (rest["cu_seqlens_q"], rest.get("cu_seqlens_k", rest["cu_seqlens_q"]))
        lengths = (rest["max_seqlen_q"], rest.get("max_seqlen_k", rest["max_seqlen_q"]))
        options = (rest.get("scale", 0.25), rest.get("causal", False), rest.get("key_mask"), *dropout, t.get("bias"))
        qkv = (t["q"], t["k"], t["v"])
        forward: tuple[Any, ...] = (*qkv, *ends, *lengths, *options)
        out, lse = kernels.attention_forward(*forward)
        backward: tuple[Any, ...] = (torch.ones_like(out), *qkv, out, lse, *ends, *lengths, *options)
    elif call.op == "add_layer_norm":
        x_bias = t.get("x_bias")
        forward = (t["x"], t["residual"], t["weight"], t["bias"], rest["eps"], x_bias, *dropout)
        out, mean, rstd = kernels.add_layer_norm_forward(*forward)
        grad = draw.normal(*out.shape, dtype=out.dtype)
        backward = (grad, t["x"], t["residual"], t["weight"], x_bias, mean, rstd, *dropout)
    elif call.op == "gelu_ffn":
        tanh = rest["approximate"] == "tanh"
        forward = (t["x"], t["w_in"], t["b_in"], t["w_out"], t.get("b_out"), tanh, True)
        out, pre = kernels.gelu_ffn_forward(*forward)
        backward = (draw.normal(*out.shape, dtype=out.dtype), t["x"], t["w_in"], t["w_out"], pre, tanh)
    elif call.op == "linear_cross_entropy":
        ignored = rest.get("ignore_index", -100)
        forward = (t["x"], t["weight"], t.get("bias"), rest["labels"], ignored)
        loss, statistics = kernels.linear_cross_entropy_forward(*forward)
        backward = (draw.normal(*loss.shape, dtype=loss.dtype), *forward[:-1], statistics, ignored, True)
    elif call.op == "linear_log1p_max":
        forward = (t["x"], t["weight"], t.get("bias"), rest["cu_seqlens"])
        out, rows = kernels.linear_log1p_max_forward(*forward)
        backward = (draw.normal(*out.shape, dtype=out.dtype), *forward[:-1], out, rows, True)
    else:
        types = rest["token_type_ids"]
        ids = (
            rest["input_ids"],
            rest["position_ids"],
            torch.zeros_like(rest["input_ids"]) if types is None else types,
        )
        tables = (t["word_embeddings"], t["position_embeddings"], t["token_type_embeddings"])
        padding = tuple(-1 if rest.get(f"{n}_padding_idx") is None else 1 for n in ("word", "position"))
        forward = (*ids, *tables, t["weight"], t["bias"], rest["eps"], *padding, *dropout)
        out, mean, rstd = kernels.embedding_layer_norm_forward(*forward)
        grad = draw.normal(*out.shape, dtype=out.dtype)
        backward = (grad, *ids, *tables, t["weight"], mean, rstd, *padding, *dropout)
    return {f"{call.op}_forward": forward, f"{call.op}_backward": backward}
