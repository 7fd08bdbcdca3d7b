"""Whether a Hugging Face class still computes what the fused code stands in for, found out by running it.

Names, parameters and parts can stay as they are while the mathematics changes. So before the first layer of a class is
replaced, a tiny one is made and compared, in float64, with the same mathematics in plain torch: milliseconds, once for
each class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from roberta_kernels.families import part_class

_known: dict[type, str | None] = {}


def difference(cls: Any, role: str) -> str | None:
    """How a class of the role "layer" or "self_attention" differs in what it computes, or None.

    torch's random state, default dtype, default device and fake tensors are neither used nor changed.
    """
    if cls not in _known:
        try:
            same = _computes_the_same(cls, role)
        except Exception as error:
            # Not kept: a later call may come from where it can be run.
            return f"{cls.__name__} cannot be run as known: {type(error).__name__}: {error}"
        _known[cls] = None if same else f"{cls.__name__} computes something else"
    return _known[cls]


def _computes_the_same(cls: Any, role: str) -> bool:
    config_class: Any = part_class(cls, "Config")
    config = config_class(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=12,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), unset_fake_temporarily():
        module = cls(config).to(torch.float64).eval()
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(_numbers(parameter.shape, i))
        hidden_states = _numbers((2, 5, 16), 100)
        mask = torch.tensor([[0.0] * 5, [0.0] * 3 + [-1e9] * 2], dtype=torch.float64)[:, None, None, :]
        got = module(hidden_states, mask)
        if role == "self_attention":
            got, want = got[0], _attention(module, hidden_states, mask)
        else:
            attended = _attention(module.attention.self, hidden_states, mask)
            attended = _output(module.attention.output, attended, hidden_states)
            want = _output(module.output, F.gelu(_dense(module.intermediate, attended)), attended)
        return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def _numbers(shape: Any, start: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + start).view(shape)


def _dense(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.dense.weight, module.dense.bias)


def _output(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    norm: nn.LayerNorm = module.LayerNorm
    return F.layer_norm(_dense(module, x) + residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attention(core: Any, x: Tensor, mask: Tensor) -> Tensor:
    heads = []
    for linear in (core.query, core.key, core.value):
        heads.append(F.linear(x, linear.weight, linear.bias).unflatten(-1, (2, 8)).transpose(1, 2))
    query, key, value = heads
    return ((query @ key.mT * 8**-0.5 + mask).softmax(-1) @ value).transpose(1, 2).flatten(2)
