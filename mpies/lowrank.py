"""Low-rank perturbations: a block of members evaluated in one batch, on shared unperturbed weights.

A matrix's noise is E = A^T B / sqrt(r) (EGGROLL, arXiv 2511.16652), so a member's product is

    y = x W^T + (sigma sign / sqrt(r)) (x B^T) A,

where the first product is shared by all members and the second is cheap. The rows of a batch belong to
the members in turn, equally many each: with P rows a member, rows [m P, (m + 1) P) are member m's.
Linear layers, Conv1D and embeddings get low-rank noise, tied ones the same; vectors (norms, biases)
get full noise, a vector per member. The weights themselves are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mpies.errors import InputError
from mpies.noise.definition import STREAM_A, STREAM_B, STREAM_NOISE
from mpies.population import Member
from mpies.weights import Weights


@dataclass
class Factors:
    """A block's noise of one matrix, in the live dtype.

    a: (M, rank, rows), with sigma sign / sqrt(rank) in it; b: (M, rank, columns).
    """

    a: torch.Tensor
    b: torch.Tensor


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
        self._shown = -1
        self._rows = 0
        model.register_forward_pre_hook(self._note_rows, with_kwargs=True)
        names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        for path, module in model.named_modules():
            own = {key: p for key, p in module._parameters.items() if p is not None}
            if own:
                self._wrap(path, module, {key: names[p.data_ptr()] for key, p in own.items()})

    def set(self, members: list[Member], sigma: float) -> None:
        """Draw the block's noise: M (rows + columns) rank numbers per matrix, M times a vector's."""
        if self._shown != self.weights.updates:
            self.weights.show_base()
            self._shown = self.weights.updates
        self.members = len(members)
        for name, base in self.weights.base.items():
            dtype = self.weights.live[name].dtype
            if base.dim() == 2:
                rows, columns = base.shape
                scale = sigma / math.sqrt(self.rank)
                a = self._draw(members, name, self.rank * rows, STREAM_A, dtype, scale)
                b = self._draw(members, name, self.rank * columns, STREAM_B, dtype)
                self.matrices[name] = Factors(a.view(-1, self.rank, rows), b.view(-1, self.rank, columns))
            else:
                noise = self._draw(members, name, base.numel(), STREAM_NOISE, torch.float32, sigma)
                self.vectors[name] = noise.add_(base).to(dtype)

    def clear(self) -> None:
        """Back to the plain model, with the base's weights."""
        self.members = 0
        self.matrices.clear()
        self.vectors.clear()
        self.weights.show_base()

    def _draw(self, members, name, count, stream, dtype, scale=None) -> torch.Tensor:
        """(M, count): every member's numbers of a stream, times scale * sign if a scale is given."""
        base = self.weights.base[name]
        drawn = torch.empty(len(members), count, dtype=dtype, device=base.device)
        for row, member in zip(drawn, members, strict=True):
            noise = self.weights.kernels.normal(
                count, member.seed, self.weights.ids[name], stream, base.device
            )
            row.copy_(noise if scale is None else noise * (scale * member.sign))
        return drawn

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
                x = x.expand(self._rows, *x.shape[1:])
            return batched(x)

        module.forward = forward

    def _note_rows(self, _module, arguments, named) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        self._rows = len(ids if ids is not None else named["inputs_embeds"])

    def _linear(self, module: nn.Linear | Conv1D, names: dict[str, str]):
        transposed = isinstance(module, Conv1D)

        def forward(x):
            weight = module.weight.t() if transposed else module.weight
            noise = self.matrices[names["weight"]]
            into, out = (noise.a, noise.b) if transposed else (noise.b, noise.a)
            y = functional.linear(x, weight).view(self.members, -1, weight.shape[0])
            hidden = torch.bmm(x.reshape(self.members, -1, weight.shape[1]), into.transpose(1, 2))
            y = torch.baddbmm(y, hidden, out)
            if "bias" in names:
                y = y + self.vectors[names["bias"]].unsqueeze(1)
            return y.view(*x.shape[:-1], -1)

        return forward

    def _embedding(self, module: nn.Embedding, name: str):
        def forward(ids):
            noise = self.matrices[name]
            plain = functional.embedding(ids, module.weight).view(self.members, -1, module.weight.shape[1])
            mine = ids.reshape(self.members, 1, -1).expand(-1, self.rank, -1)
            picked = torch.gather(noise.a, 2, mine).transpose(1, 2)
            return torch.baddbmm(plain, picked, noise.b).view(*ids.shape, -1)

        return forward

    def _layer_norm(self, module: nn.LayerNorm, names: dict[str, str]):
        def forward(x):
            y = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
            y = y.view(self.members, -1, x.shape[-1])
            y = y * self.vectors[names["weight"]].unsqueeze(1)
            if "bias" in names:
                y = y + self.vectors[names["bias"]].unsqueeze(1)
            return y.view_as(x)

        return forward

    def _elementwise(self, module: nn.Module, names: dict[str, str], plain):
        """Norms that multiply by their weight: lend them one that broadcasts over the members' rows."""

        def forward(x):
            own = dict(module._parameters)
            rows = x.shape[0] // self.members
            try:
                for key, name in names.items():
                    vector = self.vectors[name].repeat_interleave(rows, dim=0)
                    module._parameters[key] = vector.view(-1, *[1] * (x.dim() - 2), vector.shape[1])
                return plain(x)
            finally:
                module._parameters.update(own)

        return forward
