"""Low-rank perturbations in vLLM: the block's noise, drawn into the buffers of vLLM's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpies.engines.vllm import WITHOUT_BLOCKS
from mpies.errors import InputError
from mpies.es.population import Member
from mpies.model.lowrank import draw_factors, draw_vectors, share_of
from mpies.model.weights import Weights

if TYPE_CHECKING:
    from mpies.engines.vllm.layers import Layers
    from mpies.engines.vllm.noise import MatrixNoise


@dataclass(frozen=True)
class Matrix:
    """Where the noise of one of transformers' matrices is."""

    a: torch.Tensor
    """(M + 1, rank, rows)"""
    b: list[torch.Tensor]
    """(M + 1, rank, columns), the same for every part of vLLM's matrix that this one is."""


class BlocksInVllm:
    """A block of members in vLLM at once: requests say whose they are. A `Perturbation`.

    Raises InputError for a model whose matrices are not whole parts of vLLM's.
    """

    def __init__(self, weights: Weights, layers: Layers):
        self.weights = weights
        self.layers = layers
        layers.share = share_of(weights.kernels)
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        for name, live in weights.live.items():
            self._find(name, live)
        self.clear()

    def set(self, members: list[Member], sigma: float) -> None:
        """Draw the block's noise, as `model.lowrank.LowRank` does."""
        self.set_each(members, dict.fromkeys(self.weights.base, sigma))

    def set_each(self, members: list[Member], sigmas: Mapping[str, float]) -> None:
        """The same with a sigma for each parameter."""
        count, weights, most = len(members), self.weights, self.layers.members.nobody
        # The buffers' last row is nobody's, and would take the noise of one more without a word.
        assert count <= most, f"{count} members, where a block has {most}"
        self.weights.show_base()
        self._take_vectors()
        for name, place in self.matrices.items():
            first, *others = (b[:count] for b in place.b)
            draw_factors(place.a[:count], first, weights, members, name, sigmas[name])
            for other in others:
                other.copy_(first)
        for name, vectors in self.vectors.items():
            draw_vectors(vectors[:count], weights, members, name, sigmas[name])
        self.layers.idle = False

    def rows(self, members: torch.Tensor) -> None:
        """Only transformers' model has rows, and it has no members here."""

    def clear(self) -> None:
        """Back to the plain model, with the base's weights."""
        self.weights.show_base()
        self.rest()

    def rest(self) -> None:
        """Back to the plain model, with the live weights as they are."""
        self._take_vectors()
        self.layers.idle = True

    def _take_vectors(self) -> None:
        """The live weights' vectors are nobody's, too: on GPUs, who is no member computes with these."""
        for name, vectors in self.vectors.items():
            vectors[-1] = self.weights.live[name]

    def _find(self, name: str, live: torch.Tensor) -> None:
        """The buffers of the parameter whose live weights these are."""
        for parameter, noise in self.layers.matrices.items():
            if live.dim() == 2 and (first := _row(live, parameter)) is not None:
                self.matrices[name] = _matrix(name, noise, first, len(live))
                return
        for parameter, vectors in self.layers.vectors.items():
            if live.dim() == 1 and (first := _row(live, parameter)) is not None:
                self.vectors[name] = vectors[:, first : first + len(live)]
                return
        raise _refusal(f"where {name} is")


def _row(live: torch.Tensor, parameter: torch.Tensor) -> int | None:
    """The row of vLLM's parameter that transformers' begins at; None if it is not there.

    Memory is counted in bytes: rows of another length, in memory near by, would count as others.
    """
    first, rest = divmod(live.data_ptr() - parameter.data_ptr(), parameter.stride(0) * parameter.itemsize)
    last = live.data_ptr() + live.nbytes
    inside = parameter.data_ptr() <= live.data_ptr() and last <= parameter.data_ptr() + parameter.nbytes
    return first if inside and rest == 0 and live.shape[1:] == parameter.shape[1:] else None


def _matrix(name: str, noise: MatrixNoise, first: int, rows: int) -> Matrix:
    parts = noise.parts_of(first, first + rows)
    if not parts:
        raise _refusal(f"parts of vLLM's layers as {name} is")
    return Matrix(noise.a[:, :, first : first + rows], [noise.b[:, part] for part in parts])


def _refusal(what: str) -> InputError:
    return InputError(f"es.perturbation: lowrank does not know {what}; {WITHOUT_BLOCKS}")
