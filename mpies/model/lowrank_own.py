"""Parameters that stand for each row's own member's, by the functions that a model's code calls with them.

Some modules do not just multiply by their parameters: a router chooses by them, a mixer hands its
convolution's weight to a function, a layer of attention adds a number of each head. In their places a
module gets tensors whose functions are in `RULES`; any other function raises `UnknownUse`, and the module
has to be computed member by member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpies.model.linear_cpu import linear
from mpies.model.lowrank_block import Block, Factors


class UnknownUse(Exception):
    """A function, or its arguments, for which there is no rule here."""


class Own(Tensor):
    """A parameter with all members' noise: an `OwnMatrix` or `OwnVector`. It looks as the shared one."""

    block: Block

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        given = kwargs or {}
        if function in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **given)
        if function not in RULES:
            raise UnknownUse(getattr(function, "__name__", str(function)))
        return RULES[function](*args, **given)


class OwnMatrix(Own):
    """weight: the shared matrix; noise: what is added to it, of each member."""

    weight: Tensor
    noise: Factors

    @staticmethod
    def of(block: Block, weight: Tensor, noise: Factors) -> OwnMatrix:
        made = Tensor._make_subclass(OwnMatrix, weight.detach())
        made.block, made.weight, made.noise = block, weight.detach(), noise
        return made


class OwnVector(Own):
    """members (M, ...): each one's. Of any shape, most often a vector."""

    members: Tensor

    @staticmethod
    def of(block: Block, values: Tensor) -> OwnVector:
        made = Tensor._make_subclass(OwnVector, values[0])
        made.block, made.members = block, values
        return made

    def of_rows(self) -> Tensor:
        """(rows, ...)"""
        return self.members[self.block.rows.members]

    def beside(self, other: Tensor) -> Tensor:
        """In a shape that broadcasts with what is computed of rows, or of all rows' tokens."""
        own, rows, dims = self.of_rows(), len(self.block.rows), other.dim()
        if dims < own.dim() or (other.shape[0] % rows and other.shape[0] != 1):
            raise UnknownUse(f"rows {tuple(other.shape)}")
        if not self.block.alone and other.shape[0] > rows:
            own = own.repeat_interleave(other.shape[0] // rows, dim=0)
        return own.view(len(own), *[1] * (dims - own.dim()), *own.shape[1:])


def _unary(function: Callable[..., Tensor]) -> Callable[..., Own]:
    def rule(own: Own, *rest: Any, **named: Any) -> Own:
        if isinstance(own, OwnVector):
            return OwnVector.of(own.block, function(own.members, *rest, **named))
        if function in CASTS and isinstance(own, OwnMatrix):
            noise = (function(part, *rest, **named) for part in (own.noise.a, own.noise.b))
            return OwnMatrix.of(own.block, function(own.weight, *rest, **named), Factors(*noise))
        raise UnknownUse(function.__name__)

    return rule


def _binary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(left: Any, right: Any, **named: Any) -> Tensor:
        own = left if isinstance(left, OwnVector) else right
        if not isinstance(own, OwnVector):
            raise UnknownUse(function.__name__)
        block, others = own.block, [x for x in (left, right) if x is not own]
        if all((isinstance(x, OwnVector) and x.shape == own.shape) or _is_number(x) for x in others):
            values = (x.members if isinstance(x, OwnVector) else x for x in (left, right))
            return OwnVector.of(block, function(*values, **named))
        (other,) = others
        if not isinstance(other, Tensor) or isinstance(other, Own):
            raise UnknownUse(function.__name__)
        if other.dim() == own.dim() and other.shape == own.shape:  # one that all members share
            values = (x.members if x is own else x for x in (left, right))
            return OwnVector.of(block, function(*values, **named))
        beside = own.beside(other)
        return function(*(beside if x is own else x for x in (left, right)), **named)

    return rule


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def _shaped(own: OwnVector, *sizes: Any) -> Tensor:
    """reshape or view: to (1, ...) for a single row's parameter, of which there are as many as rows now."""
    shape = tuple(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
    if not isinstance(own, OwnVector) or len(shape) < 2 or shape[0] != 1:
        raise UnknownUse("reshape")
    values = own.of_rows()
    return values.reshape(len(values), *shape[1:])


def _indexed(own: OwnVector, key: Any) -> Tensor:
    """own[None, ...]"""
    if not isinstance(own, OwnVector) or not isinstance(key, tuple) or key[0] is not None:
        raise UnknownUse("indexing")
    of_each_row = (slice(None), *key[1:])
    return own.of_rows()[of_each_row]


def _expanded_as(own: OwnVector, other: Tensor) -> Tensor:
    return own.beside(other).expand_as(other)


def _unsqueezed(own: OwnVector, dim: int) -> OwnVector:
    return OwnVector.of(own.block, own.members.unsqueeze(dim + 1 if dim >= 0 else dim))


def _squeezed(own: OwnVector, dim: int) -> OwnVector:
    return OwnVector.of(own.block, own.members.squeeze(dim + 1 if dim >= 0 else dim))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, OwnVector) or isinstance(x, Own):
        raise UnknownUse("linear")
    y = linear(x, weight.weight if isinstance(weight, OwnMatrix) else weight)
    if isinstance(weight, OwnMatrix):
        _of_rows(weight.block, x)
        y = y.contiguous()
        weight.block.add_product(y, x, weight.noise)
    if bias is None:
        return y
    return y + (bias.beside(y) if isinstance(bias, OwnVector) else bias)


def _of_rows(block: Block, x: Tensor) -> None:
    """Is x of all rows, or of all rows' tokens one after another?"""
    rows = len(block.rows)
    if not block.alone and x.shape[0] != rows and x.shape[0] % (rows * block.tokens):
        raise UnknownUse(f"rows {tuple(x.shape)}")


def _turned(own: Own) -> Own:
    if not isinstance(own, OwnMatrix):
        raise UnknownUse("transposition")
    return OwnMatrix.of(own.block, own.weight.t(), own.noise.turned())


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    if not isinstance(matrix, OwnMatrix):
        raise UnknownUse("matmul")
    return _linear(x, _turned(matrix))


def _embedding(
    ids: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_, **__
) -> Tensor:
    if not isinstance(weight, OwnMatrix) or max_norm is not None or ids.dim() != 2:
        raise UnknownUse("embedding")
    rows = len(weight.block.rows)
    if len(ids) == 1:
        ids = ids.expand(rows, -1)
    if len(ids) != rows and not weight.block.alone:
        raise UnknownUse("embedding")
    return weight.block.looked_up(ids, weight.weight, weight.noise)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """A convolution of each channel for itself, x (rows, channels, tokens): as one of all rows' channels."""
    if not isinstance(weight, OwnVector) or x.dim() != 3 or groups != x.shape[1] or groups != weight.shape[0]:
        raise UnknownUse("conv1d")
    own, shift = weight.of_rows(), bias
    if isinstance(bias, OwnVector):
        shift = bias.of_rows().flatten()
    elif bias is not None:
        shift = bias.repeat(len(own))
    if weight.block.alone:
        return functional.conv1d(x, own[0], shift, stride, padding, dilation, groups)
    if len(x) != len(own):
        raise UnknownUse("conv1d")
    channels = x.reshape(1, -1, x.shape[-1])
    y = functional.conv1d(channels, own.flatten(0, 1), shift, stride, padding, dilation, len(own) * groups)
    return y.view(len(x), -1, y.shape[-1])


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return functional.rms_norm(x, shape, None, eps) * weight


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_
) -> Tensor:
    y = functional.layer_norm(x, shape, None, None, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


ANY: Any = Tensor  # whose properties are functions of the class
# What may be asked of a parameter without computing with it.
LOOKS: set[Any] = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "layout",
        "itemsize",
    )
} | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.is_contiguous}
CASTS: set[Any] = {
    Tensor.float,
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.bfloat16,
    Tensor.half,
    Tensor.contiguous,
}
UNARY: set[Any] = CASTS | {
    torch.exp, Tensor.exp, torch.neg, Tensor.neg, Tensor.__neg__, torch.sigmoid, Tensor.sigmoid, torch.tanh,
    functional.softplus, functional.sigmoid, functional.relu, Tensor.abs, torch.abs, Tensor.square, torch.log,
}  # fmt: skip
BINARY: set[Any] = {
    torch.add, torch.sub, torch.mul, torch.div, Tensor.add, Tensor.sub, Tensor.mul, Tensor.div,
    Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__,
    Tensor.__truediv__, Tensor.__rtruediv__,
}  # fmt: skip
RULES: dict[Any, Callable[..., Any]] = {
    **{function: _unary(function) for function in UNARY},
    **{function: _binary(function) for function in BINARY},
    **dict.fromkeys((Tensor.reshape, Tensor.view, torch.reshape), _shaped),
    **dict.fromkeys((Tensor.unsqueeze, torch.unsqueeze), _unsqueezed),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _squeezed),
    **dict.fromkeys((Tensor.t, torch.t, ANY.T.__get__, ANY.mT.__get__), _turned),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    Tensor.__getitem__: _indexed,
    Tensor.expand_as: _expanded_as,
    functional.linear: _linear,
    functional.embedding: _embedding,
    functional.conv1d: _convolved,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.layer_norm: _layer_norm,
}
