"""vLLM's linear layers on CPUs: packed into oneDNN's layout, anew before every call.

oneDNN multiplies faster by a weight that lies in blocks of its own, so vLLM packs all weights when it has
loaded them. Here they change with every member. Packing them again costs little more than a perturbation
does, and is won back in some ten tokens: see docs/performance.md. It takes a second copy of the matrices, on
CPUs only; GPUs multiply by the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mpies.model.linear_cpu import linear

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x, weight, bias -> x W^T + bias."""


class LinearLayer(Protocol):
    """What is used of vLLM's."""

    weight: torch.Tensor
    cpu_linear: Product


class Packing:
    """The linear layers of a vLLM model, between loading and computing."""

    def __init__(self) -> None:
        self.layers: list[LinearLayer] = []

    def take(self, layer: LinearLayer, remove_weight: bool) -> None:
        """In place of vLLM's own packing: the parameter stays, and is packed later."""
        layer.cpu_linear = linear
        if layer.weight.dim() == 2:
            self.layers.append(layer)

    @property
    def bytes(self) -> int:
        """Of the packed copies."""
        return sum(layer.weight.nbytes for layer in self.layers)

    def refresh(self) -> None:
        """Pack the weights as they are now."""
        from vllm import _custom_ops

        for layer in self.layers if _custom_ops._supports_onednn else ():
            layer.cpu_linear = packed_product(layer.weight)


def packed_product(weight: torch.Tensor) -> Product:
    """The product with a copy of the weight in oneDNN's layout."""
    from vllm import _custom_ops

    packed = _custom_ops.create_onednn_mm(weight.t(), 32)
    return lambda x, _, bias: _custom_ops.onednn_mm(packed, x, bias)
