"""How modules of each kind compute with a block of members: the table of what low rank knows.

A module is known by its exact class: of a subclass whose forward is another, nothing is assumed. A class
that is not in the table, but has only vectors for parameters, is taken for one that multiplies and adds
them element by element, as norms do: its own forward is called with vectors that broadcast. That, and
everything else here, is compared with the members' own weights at every start (engines/selftest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mpies.errors import InputError
from mpies.model.linear_cpu import linear
from mpies.model.lowrank_block import Block


@dataclass(frozen=True)
class Wrapped:
    """A module with parameters of its own, in a model."""

    path: str
    module: nn.Module
    names: dict[str, str]
    """Of its parameters: the name in the module -> the name in the weights."""
    plain: Callable[..., Any]
    """The module's own forward."""

    def parameter(self, key: str) -> torch.Tensor:
        """One of the module's parameters, as it is live."""
        found = self.module._parameters[key]
        assert found is not None
        return found

    def refuse(self, what: str = "the {} at {}") -> NoReturn:
        """Raise InputError; `what` low rank does not know of the module."""
        told = what.format(type(self.module).__name__, self.path or "the top")
        raise InputError(f"es.perturbation: lowrank does not know {told}; use es.perturbation=full")

    @contextmanager
    def lent(self, **parameters: torch.Tensor) -> Iterator[None]:
        """The module has other tensors for parameters, for the time being."""
        own = dict(self.module._parameters)
        try:
            self.module._parameters.update(parameters)  # type: ignore[arg-type]  # tensors do as well
            yield
        finally:
            self.module._parameters.update(own)


# rule(block, place, x, *others) computes what the module's forward does of x (rows, ...) and other
# arguments, with each row's own member's parameters.
Rule = Callable[..., torch.Tensor]


def linear_layer(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """x W^T + bias."""
    y = linear(x, place.parameter("weight"))
    block.add_product(y, x, block.matrices[place.names["weight"]], place.names.get("bias"))
    return y


def conv1d(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """x W + bias: GPT-2's linear layers, whose matrices lie the other way round."""
    y = linear(x, place.parameter("weight").t())
    block.add_product(y, x, block.matrices[place.names["weight"]].turned(), place.names.get("bias"))
    return y


def embedding(block: Block, place: Wrapped, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the weight."""
    if ids.dim() != 2:
        place.refuse("what the {} at {} is asked for")
    return block.looked_up(ids, place.parameter("weight"), block.matrices[place.names["weight"]])


def changed_embedding(block: Block, place: Wrapped, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the weight, changed by the module's own forward: they are lent to it as its weight."""
    found = embedding(block, place, ids)
    numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    module = cast(nn.Embedding, place.module)
    padding, module.padding_idx = module.padding_idx, None
    try:
        with place.lent(weight=found.view(-1, found.shape[-1])):
            return place.plain(numbers)
    finally:
        module.padding_idx = padding


def layer_norm(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """Torch's takes no vectors that broadcast."""
    module = cast(nn.LayerNorm, place.module)
    y = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    y = y * block.vector(place.names["weight"], x.dim())
    if "bias" in place.names:
        y += block.vector(place.names["bias"], y.dim())
    return y


def rms_norm(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm and those that are written as it is: on a GPU, one operation instead of eight."""
    if not block.fuses(x):
        return elementwise(block, place, x)
    from mpies.model import lowrank_gpu

    epsilon = float(cast(Any, place.module).variance_epsilon)
    vectors = block.vectors[place.names["weight"]]
    return lowrank_gpu.rms_norm(x.contiguous(), block.row_members, vectors, epsilon)


def elementwise(block: Block, place: Wrapped, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    """The module's own forward, with vectors that broadcast over the rows."""
    with place.lent(**{key: block.vector(name, x.dim()) for key, name in place.names.items()}):
        return place.plain(x, *rest, **named)


def in_turns(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """The module's own forward with a member's vectors on the member's rows, one member after another."""
    y = torch.empty_like(x)
    for member in sorted(set(block.members_array.tolist())):
        rows = (block.row_members == member).nonzero()[:, 0]
        with place.lent(**{key: block.vectors[name][member] for key, name in place.names.items()}):
            y[rows] = place.plain(x[rows])
    return y


# Classes of transformers' models by name, so that no model is imported that nobody uses.
KNOWN: dict[type[nn.Module] | str, Rule] = {
    nn.Linear: linear_layer,
    "FalconLinear": linear_layer,
    Conv1D: conv1d,
    nn.Embedding: embedding,
    "GemmaTextScaledWordEmbedding": changed_embedding,
    "Gemma2TextScaledWordEmbedding": changed_embedding,
    "Gemma3TextScaledWordEmbedding": changed_embedding,
    "Gemma3nTextScaledWordEmbedding": changed_embedding,
    "Gemma4TextScaledWordEmbedding": changed_embedding,
    "Gemma4UnifiedTextScaledWordEmbedding": changed_embedding,
    "VaultGemmaTextScaledWordEmbedding": changed_embedding,
    "MiniCPM3ScaledWordEmbedding": changed_embedding,
    "BioGptScaledWordEmbedding": changed_embedding,
    "XGLMScaledWordEmbedding": changed_embedding,
    nn.LayerNorm: layer_norm,
    "LlamaRMSNorm": rms_norm,
    "MistralRMSNorm": rms_norm,
    "Qwen2RMSNorm": rms_norm,
    "Qwen3RMSNorm": rms_norm,
    "NemotronLayerNorm1P": in_turns,
}


def rule_for(place: Wrapped) -> Rule:
    """The rule for a module's class. Raises InputError, naming it, if there is none."""
    kind = type(place.module)
    if kind in KNOWN:
        return KNOWN[kind]
    if kind.__module__.startswith("transformers.") and kind.__name__ in KNOWN:
        return KNOWN[kind.__name__]
    if all(parameter is None or parameter.dim() == 1 for parameter in place.module._parameters.values()):
        return elementwise
    place.refuse()
