"""Decay towards the initial weights, against forgetting (anchored weight decay, arXiv 2605.30148).

ES moves weights further than gradient methods do, mostly at random. After each update,
base <- base + decay * (initial - base). The initial weights are read from the model's safetensors
files, tensor by tensor, each time: on the way, memory for one tensor is needed.
"""

from __future__ import annotations

import torch

from mpies.errors import InputError
from mpies.model.initial import InitialFromFiles
from mpies.model.weights import Pull, Weights


class Anchor:
    """Pulls the base towards the initial weights with the digest `digest`.

    Raises InputError if the model's files do not hold them one by one; see initial.py.
    """

    def __init__(self, path: str, weights: Weights, digest: int):
        try:
            self._files = InitialFromFiles(path, weights, digest)
            self._weights = weights
        except InputError as error:
            raise InputError(f"es.anchor_decay: {error}; set it to 0") from None

    def initial(self, name: str) -> torch.Tensor:
        """The initial value of a parameter: float32, a tensor of its own, on the weights' device."""
        return self._files.read(name, self._weights)

    def pulling(self, decay: float) -> Pull:
        """Moves a parameter's value by `decay` of the way towards the initial one."""
        return lambda name, value: pull_towards(self.initial(name), value, decay)


def pull_towards(initial: torch.Tensor, value: torch.Tensor, decay: float) -> None:
    """value <- value + decay * (initial - value); `initial` is overwritten.

    Three float32 operations, each rounded on its own, in this order on every device.
    """
    initial.sub_(value)
    initial.mul_(decay)
    value.add_(initial)
