"""Layers for `kernels.kernelize`: a forward alone each, which runs on the parameters of the layer that it replaces."""

from __future__ import annotations

import torch
from torch import nn

from . import ops


class RobertaSelfOutput(nn.Module):
    """dense, dropout and LayerNorm of the sum with the residual; the same in BERT, ELECTRA and XLM-RoBERTa."""

    can_torch_compile: bool = True

    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """hidden_states `[..., inner]`, input_tensor `[..., hidden]` -> `[..., hidden]`."""
        norm, shape = self.LayerNorm, input_tensor.shape
        dropout_p = self.dropout.p if self.training else 0.0
        return ops.add_layer_norm(
            nn.functional.linear(hidden_states, self.dense.weight).reshape(-1, shape[-1]),
            input_tensor.reshape(-1, shape[-1]),
            norm.weight,
            norm.bias,
            eps=norm.eps,
            x_bias=self.dense.bias,
            dropout_p=dropout_p,
            seed=ops.draw_seeds(1, input_tensor.device)[0] if dropout_p > 0.0 else None,
        ).view(shape)


class RobertaOutput(RobertaSelfOutput):
    """The same at the end of the feed-forward block."""
