"""How a block of members is put into the model for its evaluation: one by one, or all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from mpies import config
from mpies.es.population import Member
from mpies.model.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Perturbation(Protocol):
    def set(self, members: list[Member], sigma: float) -> None:
        """From now on, the model computes as these members: theta + sigma * sign * noise(seed)."""
        ...

    def rows(self, members: torch.Tensor) -> None:
        """From now on, row i of a batch belongs to member members[i] of the block; int64 (rows,)."""
        ...

    def clear(self) -> None:
        """From now on, the model computes with the base weights."""
        ...

    def rest(self) -> None:
        """From now on, the model computes with the live weights as they are, without members."""
        ...


class Full:
    """Every element has its own noise; a block is one member, whose weights are the live weights."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def set(self, members: list[Member], sigma: float) -> None:
        (member,) = members
        self.weights.perturb(member.seed, sigma * member.sign)

    def rows(self, members: torch.Tensor) -> None:
        """They are all the same member's."""

    def clear(self) -> None:
        self.weights.show_base()

    def rest(self) -> None:
        """Nothing is left to do: a member is in the live weights only."""


def make(es: config.EsSettings, model: PreTrainedModel, weights: Weights) -> Perturbation:
    """The perturbation that `es.perturbation` names."""
    if es.perturbation == "full":
        return Full(weights)
    from mpies.model.lowrank import LowRank

    return LowRank(model, weights, es.rank)
