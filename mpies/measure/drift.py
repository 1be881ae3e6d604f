"""How far the weights have moved: ||theta - theta_0||, per group of layers and in all."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch

from mpies.ranks.collectives import allgather_objects, barrier

if TYPE_CHECKING:
    from mpi4py.MPI import Comm
    from transformers import PreTrainedModel

    from mpies.model.initial import InitialWeights
    from mpies.replica import Replica

PIECE = 2**22  # elements that are turned into float64 at a time


def measure_drift(comm: Comm, replica: Replica, initial: InitialWeights) -> dict[str, float]:
    """Group -> L2 norm of base - initial, `all` first; the same on every rank. Collective.

    Groups: embedding, layer 0, layer 1, ..., head (unless it is tied to the embedding), other. Squares
    are summed in float64; ranks share the parameters.
    """
    weights = replica.weights
    names = list(weights.base)
    mine = {
        name: squared_distance(weights.value(name), value)
        for name, value in initial.items(weights, set(names[comm.rank :: comm.size]))
    }
    barrier(comm)
    squares: dict[str, float] = {}
    for part in allgather_objects(comm, mine):
        squares |= part
    groups: dict[str, list[float]] = {"all": [squares[name] for name in names]}
    for name, group in groups_of(replica.model, names).items():
        groups.setdefault(group, []).append(squares[name])
    return {group: math.sqrt(math.fsum(parts)) for group, parts in groups.items()}


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """sum (a - b)^2 in float64, of two tensors of one shape."""
    pairs = zip(a.view(-1).split(PIECE), b.view(-1).split(PIECE), strict=True)
    return math.fsum(float((x.double() - y.double()).square().sum()) for x, y in pairs)


def groups_of(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Parameter name -> its group. A decoder layer is told by the first number in the name."""
    own = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    ends = {"head": model.get_output_embeddings(), "embedding": model.get_input_embeddings()}
    found = {}
    for group, module in ends.items():  # where they are tied, the embedding has the last word
        for parameter in module.parameters() if module is not None else ():
            found[own[parameter.data_ptr()]] = group
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        found.setdefault(name, f"layer {number[1]}" if number else "other")
    return {name: found[name] for name in names}
