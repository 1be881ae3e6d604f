"""vLLM's norms with vectors of each token's own member. Imports vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers import layernorm

from mpies.engines.vllm import noise
from mpies.engines.vllm.members import Owners
from mpies.model import lowrank_cpu
from mpies.model.lowrank_block import fuses

if TYPE_CHECKING:
    from mpies.engines.vllm.layers import Layers

Norm = Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""A norm, each row's own vectors by their names, x in float32 -> what it makes of x."""


def rms_norm(
    module: Any, own: dict[str, torch.Tensor], x: torch.Tensor, plus_one: bool = False
) -> torch.Tensor:
    """Rounded where vLLM rounds: x before it is multiplied."""
    weight = own["weight"]
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return normed * (weight.float() + 1.0) if plus_one else normed.to(weight.dtype) * weight


def whole_rms_norm(module: Any, own: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Rounded at the end only."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return normed * own["weight"].float()


def layer_norm(
    module: Any, own: dict[str, torch.Tensor], x: torch.Tensor, plus_one: bool = False
) -> torch.Tensor:
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    y = functional.layer_norm(x, x.shape[-1:], eps=epsilon) * (own["weight"].float() + plus_one)
    return y + own["bias"].float() if "bias" in own else y


MODELS = "vllm.model_executor.models."
# Those of a model's own by their names, since importing a model's module takes its while.
NORMS: dict[str, Norm] = {
    "vllm.model_executor.layers.layernorm.RMSNorm": rms_norm,
    "vllm.model_executor.layers.layernorm.GemmaRMSNorm": partial(rms_norm, plus_one=True),
    "vllm.model_executor.layers.layernorm.LayerNorm": layer_norm,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    f"{MODELS}commandr.LayerNorm": layer_norm,
    f"{MODELS}commandr.RMSNorm": whole_rms_norm,
    f"{MODELS}nemotron.NemotronLayerNorm1P": partial(layer_norm, plus_one=True),
}
# They hand on the residual that they are given.
UNSUMMED = {f"{MODELS}commandr.LayerNorm", f"{MODELS}commandr.RMSNorm"}
# Fused operations know them: is 1 added to the weight?
FUSED: dict[type[nn.Module], bool] = {layernorm.RMSNorm: False, layernorm.GemmaRMSNorm: True}


def name_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def knows(module: nn.Module) -> bool:
    """Is it a norm whose parameters are vectors, of all numbers that it is given?"""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return (
        name_of(module) in NORMS
        and getattr(module, "variance_size_override", None) is None
        and "weight" in module._parameters
        and all(parameter.dim() == 1 for parameter in own)
    )


def install(module: nn.Module, layers: Layers) -> None:
    """Make a norm that `knows` knows compute with members."""
    for parameter in module.parameters(recurse=False):
        layers.vectors[parameter] = parameter.new_zeros(layers.members.nobody + 1, parameter.numel())
    kind = UnsummedNorm if name_of(module) in UNSUMMED else MemberNorm
    vars(module)["forward"] = kind(module, module.forward, layers)


class MemberNorm:
    """In place of a norm's forward, with or without a sum that is to be normed."""

    def __init__(self, module: Any, plain: Callable[..., Any], layers: Layers):
        self.module, self.plain, self.layers = module, plain, layers
        self.norm = NORMS[name_of(module)]
        self.vectors = {key: layers.vectors[p] for key, p in module._parameters.items() if p is not None}
        weight = self.vectors["weight"]
        known = lowrank_cpu.knows(weight) or fuses(weight)
        self.fused = FUSED.get(type(module)) if known else None
        """Is 1 added to the weight? None: the norm is computed by torch's operations."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if self.layers.rests():
            return self.plain(x) if residual is None else self.plain(x, residual)
        y, summed = self._normed(x, residual)
        return y if residual is None else (y, summed)

    def _normed(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        owners = self.layers.members.tokens
        if self.fused is not None:
            epsilon = self.module.variance_epsilon
            return noise.rms_norm(x, residual, self.vectors["weight"], owners, epsilon, self.fused)
        own = {key: _vector(vectors, x, owners) for key, vectors in self.vectors.items()}
        total = x.float() if residual is None else x.float() + residual.float()
        return self.norm(self.module, own, total).to(x.dtype), total.to(x.dtype)


class UnsummedNorm(MemberNorm):
    """The same of a norm that is given a residual, and hands it on."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if self.layers.rests():
            return self.plain(x, residual)
        return self._normed(x, None)[0], residual


def _vector(vectors: torch.Tensor, x: torch.Tensor, owners: Owners) -> torch.Tensor:
    """Each row's own: (tokens, 1, ..., size), to be multiplied with x (tokens, ..., size)."""
    own = vectors[owners.at(x.shape[0])]
    return own.view(x.shape[0], *[1] * (x.dim() - 2), own.shape[-1])
