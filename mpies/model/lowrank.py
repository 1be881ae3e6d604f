"""Low-rank perturbations: a block of members evaluated in one batch, on shared unperturbed weights.

A matrix's noise is E = A^T B / sqrt(r) (EGGROLL, arXiv 2511.16652), so a member's product is

    y = x W^T + (sigma sign / sqrt(r)) (x B^T) A,

where the first product is shared by all members and the second is cheap: all members' factors are
stacked, and of x B^T only a row's own member's numbers are kept. Which row of a batch is which member's
is said by `rows`. Linear layers, Conv1D and embeddings get low-rank noise, tied ones the same; vectors
(norms, biases) get full noise, a vector per member. The weights themselves are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mpies.errors import InputError
from mpies.es.population import Member
from mpies.model import lowrank_cpu
from mpies.model.linear_cpu import linear
from mpies.model.weights import Weights
from mpies.noise.definition import STREAM_A, STREAM_B, STREAM_NOISE


@dataclass
class Factors:
    """A block's noise of one matrix, in the live dtype.

    a: (M rank, rows), with sigma sign / sqrt(rank) in it; b: (M rank, columns).
    """

    a: torch.Tensor
    b: torch.Tensor

    @cached_property
    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        return lowrank_cpu.raw(self.a), lowrank_cpu.raw(self.b)


class LowRank:
    """Makes a model compute with a block of members at once, between `set` and `clear`.

    Raises InputError for a model with parameters in other modules than it knows how to batch.
    """

    def __init__(self, model: nn.Module, weights: Weights, rank: int):
        self.weights = weights
        self.rank = rank
        self.members = 0
        self.matrices: dict[str, Factors] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        for path, module in model.named_modules():
            own = {key: p for key, p in module._parameters.items() if p is not None}
            if own:
                self._wrap(path, module, {key: names[p.data_ptr()] for key, p in own.items()})

    def set(self, members: list[Member], sigma: float) -> None:
        """Draw the block's noise: M (rows + columns) rank numbers per matrix, M times a vector's."""
        self.weights.show_base()  # which members do not touch: only an update makes it necessary
        self.members = len(members)
        for name, base in self.weights.base.items():
            dtype = self.weights.live[name].dtype
            if base.dim() == 2:
                rows, columns = base.shape
                scale = sigma / math.sqrt(self.rank)
                a = self._draw(members, name, self.rank * rows, STREAM_A, dtype, scale)
                b = self._draw(members, name, self.rank * columns, STREAM_B, dtype)
                self.matrices[name] = Factors(a.view(-1, rows), b.view(-1, columns))
            else:
                noise = self._draw(members, name, base.numel(), STREAM_NOISE, torch.float32, sigma)
                self.vectors[name] = noise.add_(base).to(dtype)

    def rows(self, members: torch.Tensor) -> None:
        """From now on, row i of a batch belongs to member members[i] of the block; int64 (rows,)."""
        if not self.members:
            return
        self._row_members = members
        self._members_array = members.cpu().numpy()
        everyone = torch.arange(self.members, device=members.device).repeat_interleave(self.rank)
        # (rows, 1, M rank): of all members' numbers, each row keeps its own member's.
        dtype = next(iter(self.vectors.values()), members).dtype
        self._own = (everyone == members[:, None, None]).to(dtype)
        self._row_vectors = {name: vectors[members].unsqueeze(1) for name, vectors in self.vectors.items()}

    def clear(self) -> None:
        """Back to the plain model, with the base's weights."""
        self.members = 0
        self.matrices.clear()
        self.vectors.clear()
        self.weights.show_base()

    def _draw(self, members, name, count, stream, dtype, scale=None) -> torch.Tensor:
        """(M, count): every member's numbers of a stream, times scale * sign if a scale is given."""
        base, seeds = self.weights.base[name], [member.seed for member in members]
        noise = self.weights.kernels.normal(count, seeds, self.weights.ids[name], stream, base.device)
        if scale is not None:
            scales = [scale * member.sign for member in members]
            noise *= torch.tensor(scales, dtype=torch.float32, device=base.device)[:, None]
        return noise.to(dtype)

    def _wrap(self, path: str, module: nn.Module, names: dict[str, str]) -> None:
        """Replace the module's forward by one that adds the block's noise, if there is a block."""
        plain = module.forward
        if isinstance(module, nn.Linear | Conv1D):
            batched = self._linear(module, names)
        elif isinstance(module, nn.Embedding):
            batched = self._embedding(module, names["weight"])
        elif isinstance(module, nn.LayerNorm):
            batched = self._layer_norm(module, names)
        elif all(p.dim() == 1 for p in module._parameters.values() if p is not None):
            batched = self._elementwise(module, names, plain)
        else:
            raise InputError(
                f"es.perturbation: lowrank does not know the {type(module).__name__} at {path};"
                " use es.perturbation=full"
            )

        def forward(x, *rest, **named):
            if not self.members:
                return plain(x, *rest, **named)
            if x.shape[0] == 1:  # shared by all rows, like learned positions
                x = x.expand(len(self._row_members), *x.shape[1:])
            return batched(x)

        module.forward = forward

    def _linear(self, module: nn.Linear | Conv1D, names: dict[str, str]):
        transposed = isinstance(module, Conv1D)

        def forward(x):
            noise = self.matrices[names["weight"]]
            y = linear(x, module.weight.t() if transposed else module.weight)
            if lowrank_cpu.knows(x):
                out, into = noise.raw[::-1] if transposed else noise.raw
                share = self.weights.kernels.share
                lowrank_cpu.add(y, x.contiguous(), self._members_array, out, into, self.rank, share)
            else:
                out, into = (noise.b, noise.a) if transposed else (noise.a, noise.b)
                own = functional.linear(x, into) * self._own
                y.view(-1, y.shape[-1]).addmm_(own.view(-1, own.shape[-1]), out)
            if "bias" in names:
                y += self._row_vectors[names["bias"]]
            return y

        return forward

    def _embedding(self, module: nn.Embedding, name: str):
        def forward(ids):
            noise, members = self.matrices[name], self._row_members
            a = noise.a.view(self.members, self.rank, -1)[members[:, None], :, ids]
            b = noise.b.view(self.members, self.rank, -1)[members]
            return torch.baddbmm(functional.embedding(ids, module.weight), a, b)

        return forward

    def _layer_norm(self, module: nn.LayerNorm, names: dict[str, str]):
        def forward(x):
            y = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
            y = y * self._row_vectors[names["weight"]]
            return y + self._row_vectors[names["bias"]] if "bias" in names else y

        return forward

    def _elementwise(self, module: nn.Module, names: dict[str, str], plain):
        """Norms that multiply by their weight: lend them one that broadcasts over the rows."""

        def forward(x):
            own = dict(module._parameters)
            try:
                for key, name in names.items():
                    vector = self._row_vectors[name]
                    module._parameters[key] = vector.view(-1, *[1] * (x.dim() - 2), vector.shape[-1])
                return plain(x)
            finally:
                module._parameters.update(own)

        return forward
