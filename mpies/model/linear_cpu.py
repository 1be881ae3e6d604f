"""Linear layers for few tokens on a CPU.

For a bfloat16 product, oneDNN first copies the right-hand factor into a layout of its own, at every
call. In x W^T that is the weight, and while decoding, copying it takes longer than the product. Written
as (W x^T)^T the copied factor is x. Decoding 2 rows, a layer's products take 0.6 of the time, decoding
64 rows 0.75; from some 100 rows on, turning the result round costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

FEW = 96  # rows of x


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, for x (..., K), weight (N, K), bias (N,)."""
    if x.dim() > 2 and not x.is_contiguous():
        x = x.contiguous()  # of the last tokens of many, torch makes a product a row, with a weight for each
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not 0 < rows <= FEW or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return functional.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)


def install(model: nn.Module) -> None:
    """Make a model's plain linear layers compute so.

    Layers whose forward was replaced before stay as they are: it may have been by `LowRank`, which
    computes its products with `linear` itself. So it does not matter which of the two comes first.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            vars(module)["forward"] = _forward(module)


def _forward(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: linear(x, module.weight, module.bias)
