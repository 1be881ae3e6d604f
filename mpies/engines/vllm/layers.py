"""vLLM's layers with a block's noise of low rank, as `model/lowrank.py` has it for transformers'.

Every layer with parameters computes with the noise of each token's own member: linear layers (fused ones
have a B for each of their parts), embeddings, output layers, norms. Noise has buffers that are made once,
when the model is loaded, and written in place; their last row is nobody's: no noise, or the base's vector.
A layer is known by its exact class; what a layer of another class does with its parameters, nobody knows.
Imports vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers import layernorm, linear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from mpies.engines.vllm import WITHOUT_BLOCKS
from mpies.engines.vllm.members import Members, Owners
from mpies.errors import InputError
from mpies.model import lowrank_cpu, norm_cpu

LINEAR = {
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
    linear.RowParallelLinear,
}
EMBEDDINGS = {VocabParallelEmbedding, ParallelLMHead}


class MatrixNoise(nn.Module):
    """A block's noise of a matrix (N, K) whose parts lie one below the other.

    a (M + 1, rank, N), with sigma sign / sqrt(rank) in it; b (M + 1, parts, rank, K); bias (M + 1, N).
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        sizes: list[int],
        block: int,
        rank: int,
        *,
        bias: torch.Tensor | None = None,
        padding: int = 0,
    ):
        super().__init__()
        rows, columns = weight.shape
        self.bounds = list(itertools.accumulate(sizes, initial=0))
        self.padding = padding
        assert self.bounds[-1] == rows
        made = weight.new_zeros
        self.register_buffer("a", made(block + 1, rank, rows), persistent=False)
        self.register_buffer("b", made(block + 1, len(sizes), rank, columns), persistent=False)
        self.register_buffer("bias", None if bias is None else made(block + 1, rows), persistent=False)
        self.raw = (
            lowrank_cpu.RawFactors.of(self.a, self.b, self.bounds, self.bias)
            if lowrank_cpu.knows(weight)
            else None
        )

    def parts_of(self, first: int, last: int) -> list[int]:
        """The parts that rows [first, last) of the matrix are; none unless they are whole parts.

        But for rows at the end that pad a vocabulary.
        """
        edges = list(itertools.pairwise([*self.bounds[:-1], self.bounds[-1] - self.padding]))
        inside = [part for part, (a, b) in enumerate(edges) if first <= a and b <= last]
        whole = inside and (edges[inside[0]][0], edges[inside[-1]][1]) == (first, last)
        return inside if whole else []

    def add(self, y: torch.Tensor, x: torch.Tensor, owners: Owners, share: lowrank_cpu.Share) -> torch.Tensor:
        """y (..., N) plus the members' own products of x (..., K), and their biases; in place on a CPU.

        Raises InputError for other rows than those that have owners.
        """
        rows = y.numel() // y.shape[-1]
        if self.raw is not None:
            lowrank_cpu.add(y, x.contiguous(), owners.of(rows), self.raw, share)
            return y
        own = owners.at(rows)
        flat = self._added(y.reshape(rows, -1), x.reshape(rows, -1), own)
        return flat.view(y.shape)

    def _added(self, y: torch.Tensor, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """By torch's operations: y (T, N), x (T, K), own int64 (T,)."""
        dots = (self.b[own].float() * x[:, None, None].float()).sum(-1)  # (T, parts, rank)
        spread = torch.cat(
            [
                dots[:, part, :, None].expand(-1, -1, last - first)
                for part, (first, last) in enumerate(itertools.pairwise(self.bounds))
            ],
            dim=-1,
        )
        total = y.float() + (spread * self.a[own].float()).sum(1)
        if self.bias is not None:
            total = total + self.bias[own].float()
        return total.to(y.dtype)


@dataclass
class Layers:
    """What was installed in a model. Noise is found by the parameter that it is of."""

    members: Members
    share: lowrank_cpu.Share = lowrank_cpu.at_once
    """How a CPU's work is spread over threads."""
    idle: bool = True
    """No member computes: on a CPU, layers are then what they were."""
    matrices: dict[nn.Parameter, MatrixNoise] = field(default_factory=dict)
    vectors: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    """(M + 1, size), with the base's values in it."""

    def rests(self) -> bool:
        """May a layer compute without members? On GPUs there are none instead: graphs know no branches."""
        return self.idle and self.members.tokens.on_cpu


def install(model: nn.Module, members: Members, rank: int) -> Layers:
    """Make a loaded model compute with members. Raises InputError for layers that are not known, by name."""
    layers = Layers(members)
    for path, module in list(model.named_modules()):
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not own:
            continue
        kind = type(module)
        if kind in LINEAR and type(module.quant_method) is linear.UnquantizedLinearMethod:
            _install_linear(module, path, layers, rank)
        elif kind in EMBEDDINGS and type(module.quant_method) is UnquantizedEmbeddingMethod:
            _install_embedding(module, path, layers, rank)
        elif kind in NORMS:
            _install_norm(module, path, NORMS[kind], layers)
        else:
            raise _unknown(module, path)
    return layers


def _unknown(module: nn.Module, path: str) -> InputError:
    return InputError(
        f"es.perturbation: lowrank does not know vLLM's {type(module).__name__} at {path}; {WITHOUT_BLOCKS}"
    )


def _install_linear(module: Any, path: str, layers: Layers, rank: int) -> None:
    if module.bias is not None and module.skip_bias_add:
        raise _unknown(module, path)
    sizes = list(getattr(module, "output_partition_sizes", None) or [len(module.weight)])
    noise = MatrixNoise(module.weight, sizes, layers.members.nobody, rank, bias=module.bias)
    module.mpies_noise = layers.matrices[module.weight] = noise
    if noise.bias is not None:
        layers.vectors[module.bias] = noise.bias
    module.quant_method = MemberLinear(module.quant_method, noise, layers)


def _install_embedding(module: Any, path: str, layers: Layers, rank: int) -> None:
    if getattr(module, "bias", None) is not None:
        raise _unknown(module, path)
    noise = layers.matrices.get(module.weight)  # tied ones are one
    if noise is None:
        rows = len(module.weight)
        padding = rows - module.org_vocab_size
        noise = MatrixNoise(module.weight, [rows], layers.members.nobody, rank, padding=padding)
        layers.matrices[module.weight] = noise
    module.mpies_noise = noise
    module.quant_method = MemberEmbedding(module.quant_method, noise, layers)


class MemberLinear:
    """In place of the way in which vLLM's linear layer multiplies."""

    def __init__(self, plain: Any, noise: MatrixNoise, layers: Layers):
        self.plain, self.noise, self.layers = plain, noise, layers

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.layers.rests():
            return self.plain.apply(layer, x, bias)
        y = self.plain.apply(layer, x)
        return self.noise.add(y, x, self.layers.members.tokens, self.layers.share)


class MemberEmbedding:
    """In place of the way in which vLLM looks tokens up, and multiplies by the same matrix at the end."""

    def __init__(self, plain: Any, noise: MatrixNoise, layers: Layers):
        self.plain, self.noise, self.layers = plain, noise, layers

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        found = self.plain.embedding(layer, ids)
        if self.layers.rests():
            return found
        own = self.layers.members.tokens.at(ids.shape[0])
        a, b = self.noise.a[own, :, ids], self.noise.b[own, 0]
        return torch.baddbmm(found[:, None], a[:, None], b)[:, 0]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.plain.apply(layer, x, bias)
        if self.layers.rests():
            return y
        return self.noise.add(y, x, self.layers.members.rows, self.layers.share)


def _vector(vectors: torch.Tensor, x: torch.Tensor, owners: Owners) -> torch.Tensor:
    """Each row's own: (tokens, 1, ..., size), to be multiplied with x (tokens, ..., size)."""
    own = vectors[owners.at(x.shape[0])]
    return own.view(x.shape[0], *[1] * (x.dim() - 2), own.shape[-1])


def rms_norm(
    module: Any, own: dict[str, torch.Tensor], x: torch.Tensor, plus_one: bool = False
) -> torch.Tensor:
    """Rounded where vLLM rounds: x before it is multiplied. x is float32 (see `MemberNorm`)."""
    weight = own["weight"]
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return normed * (weight.float() + 1.0) if plus_one else normed.to(weight.dtype) * weight


def layer_norm(module: Any, own: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    y = functional.layer_norm(x, module.normalized_shape, eps=module.eps) * own["weight"].float()
    return y + own["bias"].float() if "bias" in own else y


Norm = Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]
NORMS: dict[type[nn.Module], Norm] = {
    layernorm.RMSNorm: rms_norm,
    layernorm.GemmaRMSNorm: partial(rms_norm, plus_one=True),
    layernorm.LayerNorm: layer_norm,
    nn.LayerNorm: layer_norm,
}
FUSED = {layernorm.RMSNorm: False, layernorm.GemmaRMSNorm: True}


def _install_norm(module: Any, path: str, norm: Norm, layers: Layers) -> None:
    if getattr(module, "variance_size_override", None) is not None or "weight" not in module._parameters:
        raise _unknown(module, path)
    for parameter in module.parameters(recurse=False):
        made = parameter.new_zeros(layers.members.nobody + 1, parameter.numel())
        layers.vectors[parameter] = made
    vars(module)["forward"] = MemberNorm(module, module.forward, norm, layers)


class MemberNorm:
    """In place of a norm's forward, with or without a sum that is to be normed."""

    def __init__(self, module: Any, plain: Callable[..., Any], norm: Norm, layers: Layers):
        self.module, self.plain, self.norm, self.layers = module, plain, norm, layers
        self.vectors = {key: layers.vectors[p] for key, p in module._parameters.items() if p is not None}
        known = lowrank_cpu.knows(self.vectors["weight"])
        self.fused = FUSED.get(type(module)) if known else None
        """On a CPU: is 1 added to the weight? None: the norm is computed by torch's operations."""

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
            members, epsilon = owners.of(x.shape[0]), self.module.variance_epsilon
            return norm_cpu.rms_norm(x, residual, self.vectors["weight"], members, epsilon, self.fused)
        own = {key: _vector(vectors, x, owners) for key, vectors in self.vectors.items()}
        total = x.float() if residual is None else x.float() + residual.float()
        return self.norm(self.module, own, total).to(x.dtype), total.to(x.dtype)
