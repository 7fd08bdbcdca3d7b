"""Layers of an encoder with random parameters, and the same encoder in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 1e-5
SIZES = [(64, 96, 2), (48, 101, 3), (40, 33, 1), (128, 24, 8)]  # hidden, inner, heads


def make_layers(count, hidden, inner):
    def layer():
        shapes = {"qkv": (3 * hidden, hidden), "attention_out": (hidden, hidden)}
        shapes |= {"inner": (inner, hidden), "out": (hidden, inner)}
        tensors = {name: torch.randn(shape) * 1.5 * shape[1] ** -0.5 for name, shape in shapes.items()}
        for name, (rows, _) in shapes.items():
            tensors[f"{name}_bias"] = 0.3 * torch.randn(rows)
        for name in ("attention_norm", "norm"):
            tensors[f"{name}_weight"], tensors[f"{name}_bias"] = 1 + 0.3 * torch.randn(hidden), torch.randn(hidden)
        return tensors

    return [layer() for _ in range(count)]


def plain(x, layers, lengths, heads, *, causal=False, key_mask=None, tanh=False, rows=lambda x: x):
    """The encoder in plain torch, sequence by sequence, in x's dtype. rows: what is done to each left operand."""
    hidden = x.shape[1]
    seen = torch.ones(len(x), dtype=torch.bool) if key_mask is None else key_mask
    for layer in layers:
        w = {name: tensor.to(x.dtype) for name, tensor in layer.items()}

        def product(x, name, w=w):
            return F.linear(rows(x), w[name], w[f"{name}_bias"])

        def norm(x, name, w=w):
            return F.layer_norm(x, (hidden,), w[f"{name}_weight"], w[f"{name}_bias"], EPS)

        q, k, v = product(x, "qkv").view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        context = []
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            mask = seen[here].expand(length, length)
            if causal:
                mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
            scores = (q[:, here] @ k[:, here].mT * (hidden // heads) ** -0.5).masked_fill(~mask, float("-inf"))
            context.append(scores.softmax(-1).nan_to_num() @ v[:, here])
            start += length
        context = torch.cat(context, 1).transpose(0, 1).reshape(len(x), hidden)
        attended = norm(product(context, "attention_out") + x, "attention_norm")
        activation = F.gelu(product(attended, "inner"), approximate="tanh" if tanh else "none")
        x = norm(product(activation, "out") + attended, "norm")
    return x
