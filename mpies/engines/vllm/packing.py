"""vLLM's linear layers and experts on CPUs: packed anew whenever the live weights were written.

oneDNN multiplies faster by a weight that lies in blocks of its own, so vLLM packs all weights when it has
loaded them. Here they change with every member. Packing them again costs little more than a perturbation
does, and is won back in some ten tokens: see docs/performance.md. It takes a second copy of the matrices, on
CPUs only; GPUs multiply by the parameters themselves. The kernel for experts wants a layout of its own as
well, and is given copies in it in place of the parameters. And what vLLM makes of parameters when it loads
them, on all devices, is made anew with them (mapping.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from mpies.engines.vllm.mapping import Made
from mpies.errors import InputError
from mpies.model.linear_cpu import linear
from mpies.model.weights import Weights

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x, weight, bias -> x W^T + bias."""


class LinearLayer(Protocol):
    """What is used of vLLM's."""

    weight: torch.Tensor
    cpu_linear: Product


class WatchedWeights(Weights):
    """Weights that count how often the live ones were written, or are to be after the base: what was made of
    them has to be made anew."""

    writes = 0

    def _rewrite(self) -> None:
        self.writes += 1
        super()._rewrite()


class Experts:
    """vLLM's kernel for the experts of a layer, given packed copies of the layer's parameters."""

    def __init__(self, kernel: Any, layer: Any):
        self.kernel, self.layer, self._apply = kernel, layer, kernel.apply
        self.packed: tuple[torch.Tensor, torch.Tensor] = layer.w13_weight, layer.w2_weight
        kernel.apply = self.apply

    def apply(self, output: Any, hidden_states: Any, w1: Any, w2: Any, *others: Any, **named: Any) -> Any:
        """In place of the kernel's, whose arguments these are."""
        return self._apply(output, hidden_states, *self.packed, *others, **named)

    def pack(self) -> None:
        from vllm._custom_ops import cpu_prepack_moe_weight

        weights = self.layer.w13_weight, self.layer.w2_weight
        self.packed = tuple(cpu_prepack_moe_weight(weight.data, self.kernel.isa) for weight in weights)


class Packing:
    """The linear layers and experts of a vLLM model, between loading and computing."""

    def __init__(self) -> None:
        self.layers: list[LinearLayer] = []
        self.experts: list[Experts] = []
        self.made: list[Made] = []
        self.weights: WatchedWeights | None = None
        """Those that the layers hold, once they are known."""
        self._packed = 0

    def take(self, layer: LinearLayer, remove_weight: bool) -> None:
        """In place of vLLM's own packing: the parameter stays, and is packed later."""
        layer.cpu_linear = linear
        if layer.weight.dim() == 2:
            self.layers.append(layer)

    def take_experts(self, kernel: Any, layer: Any) -> None:
        """In place of the kernel's own packing. Raises InputError where it would pad the matrices."""
        own, padded = layer.w2_weight.shape[-1], kernel._padded_intermediate_size(kernel.moe_config)
        if own != padded:
            raise InputError(
                f"engine.name: vllm pads experts of {own} numbers to {padded} on CPUs, and mpies does not;"
                " use engine.name=hf"
            )
        self.experts.append(Experts(kernel, layer))

    @property
    def bytes(self) -> int:
        """Of the packed copies."""
        experts = (weight.nbytes for one in self.experts for weight in one.packed)
        return sum(layer.weight.nbytes for layer in self.layers) + sum(experts)

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
        for experts in self.experts:
            experts.pack()
        for made in self.made:
            made.remake()


def packed_product(weight: torch.Tensor) -> Product:
    """The product with a copy of the weight in oneDNN's layout."""
    from vllm import _custom_ops

    packed = _custom_ops.create_onednn_mm(weight.t(), 32)
    return lambda x, _, bias: _custom_ops.onednn_mm(packed, x, bias)
