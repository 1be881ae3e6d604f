"""A module of a model, as those know it that compute it with a block of members."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from mpies.errors import InputError


class Unfit(InputError):
    """A module that cannot be computed in the way that was tried."""

    in_turn = False
    """Did it happen while one member was computed?"""

    def __init__(self, place: Wrapped, what: str):
        told = what.format(type(place.module).__name__, place.path or "the top")
        super().__init__(f"es.perturbation: lowrank does not know {told}; use es.perturbation=full")
        self.place = place

    @classmethod
    def of(cls, place: Wrapped, what: str, in_turn: bool) -> Unfit:
        made = cls(place, what)
        made.in_turn = in_turn
        return made


@dataclass(frozen=True)
class Wrapped:
    """A module in a model."""

    path: str
    module: nn.Module
    names: dict[str, str]
    """Of its own parameters: the name in the module -> the name in the weights."""
    plain: Callable[..., Any]
    """The module's own forward."""

    def parameter(self, key: str) -> torch.Tensor:
        """One of the module's parameters, as it is live."""
        found = self.module._parameters[key]
        assert found is not None
        return found

    def refuse(self, what: str = "the {} at {}") -> NoReturn:
        """Raise Unfit; `what` low rank does not know of the module."""
        raise Unfit(self, what)

    @contextmanager
    def lent(self, **parameters: torch.Tensor) -> Iterator[None]:
        """The module has other tensors for parameters, for the time being."""
        own = dict(self.module._parameters)
        try:
            self.module._parameters.update(parameters)  # type: ignore[arg-type]  # tensors do as well
            yield
        finally:
            self.module._parameters.update(own)


# rule(block, place, *given, **named) computes what the module's forward does of its arguments, with each
# row's own member's parameters. It gets what a batch has of all rows, or, while the block is `alone`, of
# one member.
Rule = Callable[..., Any]
