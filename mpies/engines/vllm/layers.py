"""vLLM's layers with a block's noise of low rank, as `model/lowrank.py` has it for transformers'.

Every layer with parameters computes with the noise of each token's own member: linear layers (fused ones
have a B for each of their parts), embeddings, output layers, norms (norms.py). Noise has buffers that are
made once, when the model is loaded, and written in place (noise.py).
A layer is known by its exact class; what a layer of another class does with its parameters, nobody knows.
Imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from mpies.engines.vllm import WITHOUT_BLOCKS, norms
from mpies.engines.vllm.members import Members
from mpies.engines.vllm.noise import MatrixNoise
from mpies.errors import InputError
from mpies.model import lowrank_cpu

LINEAR = {
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
    linear.RowParallelLinear,
}
EMBEDDINGS = {VocabParallelEmbedding, ParallelLMHead}


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
        elif norms.knows(module):
            norms.install(module, layers)
        elif norms.name_of(module) in POSITIONS:
            _install_positions(module, path, layers, rank)
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
        return self.noise.look_up(found, ids, self.layers.members.tokens)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.plain.apply(layer, x, bias)
        if self.layers.rests():
            return y
        return self.noise.add(y, x, self.layers.members.rows, self.layers.share)


# Tables of positions' vectors, by their names, and what they add to a position that they are given.
POSITIONS = {"vllm.model_executor.models.opt.OPTLearnedPositionalEmbedding": 2}


def _install_positions(module: Any, path: str, layers: Layers, rank: int) -> None:
    if getattr(module, "offset", None) != POSITIONS[norms.name_of(module)]:
        raise _unknown(module, path)
    noise = MatrixNoise(module.weight, [len(module.weight)], layers.members.nobody, rank)
    module.mpies_noise = layers.matrices[module.weight] = noise
    vars(module)["forward"] = MemberPositions(module.forward, noise, layers, module.offset)


class MemberPositions:
    """In place of the forward of a table of positions' vectors."""

    def __init__(self, plain: Callable[..., Any], noise: MatrixNoise, layers: Layers, offset: int):
        self.plain, self.noise, self.layers, self.offset = plain, noise, layers, offset

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        found = self.plain(positions)
        if self.layers.rests():
            return found
        return self.noise.look_up(found, positions + self.offset, self.layers.members.tokens)
