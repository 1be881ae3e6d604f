"""vLLM's linear layers on CPUs: packed into oneDNN's layout, anew whenever the live weights were written.

oneDNN multiplies faster by a weight that lies in blocks of its own, so vLLM packs all weights when it has
loaded them. Here they change with every member. Packing them again costs little more than a perturbation
does, and is won back in some ten tokens: see docs/performance.md. It takes a second copy of the matrices, on
CPUs only; GPUs multiply by the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from mpies.model.linear_cpu import linear
from mpies.model.weights import Weights

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x, weight, bias -> x W^T + bias."""


class LinearLayer(Protocol):
    """What is used of vLLM's."""

    weight: torch.Tensor
    cpu_linear: Product


class WatchedWeights(Weights):
    """Weights that count how often the live ones were written: what was made of them has to be made anew."""

    writes = 0

    def perturb(self, seed: int, scale: float) -> None:
        self.writes += 1
        super().perturb(seed, scale)

    def show(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.writes += 1
        super().show(values)


class Packing:
    """The linear layers of a vLLM model, between loading and computing."""

    def __init__(self) -> None:
        self.layers: list[LinearLayer] = []
        self.weights: WatchedWeights | None = None
        """Those that the layers hold, once they are known."""
        self._packed = 0

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
        """Pack the weights, if they were written since they were packed."""
        assert self.weights, "whoever writes the weights has to say so"
        if self.weights.writes != self._packed:
            self.pack()

    def pack(self) -> None:
        """Pack the weights as they are now."""
        from vllm import _custom_ops

        if self.weights:
            self._packed = self.weights.writes

        for layer in self.layers if _custom_ops._supports_onednn else ():
            layer.cpu_linear = packed_product(layer.weight)


def packed_product(weight: torch.Tensor) -> Product:
    """The product with a copy of the weight in oneDNN's layout."""
    from vllm import _custom_ops

    packed = _custom_ops.create_onednn_mm(weight.t(), 32)
    return lambda x, _, bias: _custom_ops.onednn_mm(packed, x, bias)
