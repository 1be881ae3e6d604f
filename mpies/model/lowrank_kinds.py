"""How modules of each kind compute with a block of members: the table of what low rank knows.

A module is known by its exact class: of a subclass whose forward is another, nothing is assumed. What is
not in the table is tried in ways that suit many modules, norms first, and computed member by member where
none is right: all of it is compared with the members' own weights at every start (engines/selftest.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mpies.model import lowrank_experts
from mpies.model.linear_cpu import linear
from mpies.model.lowrank_block import Block
from mpies.model.lowrank_own import Own, OwnMatrix, OwnVector
from mpies.model.lowrank_place import Rule, Wrapped
from mpies.model.lowrank_turns import Turns
from mpies.noise.definition import matrices_in


def _of_rows(block: Block, place: Wrapped, x: Any) -> torch.Tensor:
    """x, if it is of all rows (rows, ...), or of all rows' tokens one after another, or the same for all."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        place.refuse("what the {} at {} is called with")
    rows = len(block.rows)
    if block.alone:
        return x
    if x.shape[0] == 1:  # shared by all rows, like learned positions
        return x.expand(rows, *x.shape[1:])
    # Two dimensions may be some tokens' that have been chosen, as many as rows by chance.
    chosen = x.dim() == 2 and x.is_floating_point() and block.tokens > 1
    if (chosen or x.shape[0] != rows) and x.shape[0] % (rows * block.tokens):
        place.refuse("whose rows the {} at {} is called with")
    return x


def linear_layer(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """x W^T + bias."""
    x = _of_rows(block, place, x)
    y = linear(x, place.parameter("weight"))
    block.add_product(y, x, block.matrices[place.names["weight"]], place.names.get("bias"))
    return y


def conv1d(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """x W + bias: GPT-2's linear layers, whose matrices lie the other way round."""
    x = _of_rows(block, place, x)
    y = linear(x, place.parameter("weight").t())
    block.add_product(y, x, block.matrices[place.names["weight"]].turned(), place.names.get("bias"))
    return y


def embedding(block: Block, place: Wrapped, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the weight."""
    shared = isinstance(ids, torch.Tensor) and ids.shape[0] == 1
    ids = _of_rows(block, place, ids)
    # Positions of patches, of as many images as there may be in a row.
    patches = shared and block.tokens == 1 and ids.shape[1] > 1 and len(block.rows) > 1
    if ids.dim() != 2 or (patches and not block.alone):
        place.refuse("what the {} at {} is asked for")
    return block.looked_up(ids, place.parameter("weight"), block.matrices[place.names["weight"]])


def layer_norm(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """Torch's takes no vectors that broadcast."""
    module = cast(nn.LayerNorm, place.module)
    given = _by_rows(block, _of_rows(block, place, x))
    y = functional.layer_norm(given, module.normalized_shape, eps=module.eps)
    if "weight" in place.names:
        y = y * block.vector(place.names["weight"], y.dim())
    if "bias" in place.names:
        y += block.vector(place.names["bias"], y.dim())
    return y.view(x.shape) if x.shape[0] > 1 else y


def rms_norm(block: Block, place: Wrapped, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm and those that are written as it is: on a GPU, one operation instead of eight."""
    if not block.fuses(x):
        return elementwise(block, place, x)
    from mpies.model import lowrank_gpu

    x = _of_rows(block, place, x)
    epsilon = float(cast(Any, place.module).variance_epsilon)
    vectors = block.vectors[place.names["weight"]]
    return lowrank_gpu.rms_norm(x.contiguous(), block.rows.members, vectors, epsilon)


def elementwise(block: Block, place: Wrapped, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    """The module's own forward, with vectors that broadcast over the rows."""
    x = _of_rows(block, place, x)
    count = x.shape[0]

    def by_rows(value: Any) -> Any:
        has_rows = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == count
        return _by_rows(block, value) if has_rows else value

    given = by_rows(x)
    with place.lent(**{key: block.vector(name, given.dim()) for key, name in place.names.items()}):
        y = place.plain(given, *map(by_rows, rest), **{key: by_rows(one) for key, one in named.items()})
    if not isinstance(y, torch.Tensor) or y.shape != given.shape:
        place.refuse("what the {} at {} returns")
    return y.view(x.shape)


def _by_rows(block: Block, x: torch.Tensor) -> torch.Tensor:
    """x (rows, ...), where it was all rows' tokens one after another."""
    rows = len(block.rows)
    return x if block.alone or x.shape[0] == rows else x.view(rows, -1, *x.shape[1:])


@dataclass
class InPlaceOf:
    """The module's own forward, with tensors for parameters that stand for each row's own. A `Rule`."""

    lends: list[Wrapped]
    """Modules, the one itself or in it, whose parameters stand so."""

    def __call__(self, block: Block, place: Wrapped, *given: Any, **named: Any) -> Any:
        with ExitStack() as stack:
            for lender in self.lends:
                own = {key: _own(block, lender, key, name) for key, name in lender.names.items()}
                stack.enter_context(lender.lent(**own))
            return place.plain(*given, **named)

    @staticmethod
    def can_lend(lends: list[Wrapped]) -> bool:
        """Have they no stacks of matrices?"""
        shapes = (place.parameter(key).shape for place in lends for key in place.names)
        return all(len(shape) < 3 or not matrices_in(shape) for shape in shapes)


def _own(block: Block, place: Wrapped, key: str, name: str) -> Own:
    weight = place.parameter(key)
    if name in block.matrices:
        return OwnMatrix.of(block, weight, block.matrices[name])
    return OwnVector.of(block, block.vectors[name].view(-1, *weight.shape))


def experts(block: Block, place: Wrapped, x: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
    """transformers' experts, see `lowrank_experts`."""
    x = _of_rows(block, place, x)
    if x.dim() != 2 or len(routes) != 2:
        place.refuse("what the {} at {} is called with")
    return lowrank_experts.mixed(block, place.module, place.names, x, *routes)


# Classes of transformers' models by name, so that no model is imported that nobody uses.
KNOWN: dict[type[nn.Module] | str, Rule] = {
    nn.Linear: linear_layer,
    "FalconLinear": linear_layer,
    Conv1D: conv1d,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    "LlamaRMSNorm": rms_norm,
    "MistralRMSNorm": rms_norm,
    "Qwen2RMSNorm": rms_norm,
    "Qwen3RMSNorm": rms_norm,
}

# Whose parameters are lent while the module around them computes, which may read them past their forward.
READ_BY_OTHERS: set[type[nn.Module]] = {nn.Conv1d}


def rules_for(place: Wrapped) -> list[Rule]:
    """The ways in which a module with parameters is computed: the table's, or guesses, best first."""
    kind = type(place.module)
    if kind in KNOWN:
        return [KNOWN[kind]]
    if kind.__module__.startswith("transformers.") and kind.__name__ in KNOWN:
        return [KNOWN[kind.__name__]]
    if lowrank_experts.knows(place.module):
        return [experts]
    shapes = [parameter.shape for parameter in place.module._parameters.values() if parameter is not None]
    guesses: list[Rule] = [InPlaceOf([place])] if InPlaceOf.can_lend([place]) else [Turns(place, [place])]
    if "norm" in kind.__name__.lower() and all(len(shape) == 1 for shape in shapes):
        return [elementwise, *guesses]
    return guesses


# What comes of a guess that is wrong.
GUESSES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)
