"""Where in vLLM's parameters a transformers model's parameters are.

vLLM fuses matrices (q, k and v; gate and up) and pads vocabularies, differently for every architecture.
Nothing here knows how: vLLM's own loader is given numbers instead of weights, every parameter's own
number in all its elements, and where they turn up is where the parameter lives. What is found are rows
of vLLM's tensors, so they are contiguous. That rows have not changed places on the way is checked with the
weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from mpies.errors import InputError, reason
from mpies.model.weights import Tensors

DIGITS = 200  # a number is told in two digits, 1 to 200, which every floating-point dtype holds exactly


class VllmModel(Protocol):
    """What is used of vLLM's model: a module's ways to its parts, and its own loader."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any: ...


def find_views(model: VllmModel, base: Tensors, dtype: torch.dtype) -> Tensors:
    """Views of vLLM's parameters in the shapes and by the names of `base`, filled with cast(base).

    model: vLLM's. Raises InputError where a parameter is not in vLLM's model as it is in transformers',
    or where vLLM's model has parameters that no parameter of transformers' fills.
    """
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if parameter.dtype != dtype:
            raise _refusal(f"vLLM keeps {name} in {parameter.dtype}".replace("torch.", ""))
    numbers = {name: _numbers(model, own, base, place) for place, name in enumerate(("high", "low"))}
    found: Tensors = {}
    for number, name in enumerate(base):
        high, low = divmod(number, DIGITS)
        found[name] = _view(name, base[name], own, numbers["high"], numbers["low"], high + 1, low + 1)
    _refuse_unfilled(model, own, numbers["low"])
    _compare(model, base, found, dtype)
    return found


def _numbers(model: VllmModel, own: Mapping[str, nn.Parameter], base: Tensors, place: int) -> Tensors:
    """A digit of the number of the parameter that each row of vLLM's parameters is from; 0: of none.

    On the CPU, where they are looked through: on a GPU, each look would have to be waited for.
    """
    for parameter in own.values():
        parameter.data.zero_()

    def marked() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(base.items()):
            digit = divmod(number, DIGITS)[place] + 1
            like = next(iter(own.values()))
            yield (
                name,
                torch.full((), float(digit), dtype=like.dtype, device=like.device).expand(tensor.shape),
            )

    _load(model, marked())
    return {
        name: (parameter.data.flatten(1)[:, 0] if parameter.dim() > 1 else parameter.data).cpu().clone()
        for name, parameter in own.items()
    }


def _view(
    name: str,
    base: torch.Tensor,
    own: Mapping[str, nn.Parameter],
    highs: Tensors,
    lows: Tensors,
    high: int,
    low: int,
) -> torch.Tensor:
    """The rows of vLLM's parameters whose digits are `high` and `low`."""
    places = [
        (key, rows) for key in own if len(rows := ((highs[key] == high) & (lows[key] == low)).nonzero()[:, 0])
    ]
    if len(places) != 1:
        raise _refusal(f"{name} is in {len(places)} of vLLM's parameters")
    ((key, rows),) = places
    first, last = int(rows[0]), int(rows[-1])
    view = own[key].data[first : last + 1]
    if len(rows) != last - first + 1 or view.shape != base.shape:
        raise _refusal(f"{name} is {tuple(base.shape)} in transformers, but otherwise in vLLM's {key}")
    return view


def _refuse_unfilled(model: VllmModel, own: Mapping[str, nn.Parameter], lows: Tensors) -> None:
    """Every row must be some parameter's, but for those that pad a vocabulary."""
    padded = {
        f"{path}.weight": module.org_vocab_size
        for path, module in model.named_modules()
        if hasattr(module, "org_vocab_size")
    }
    for name in own:
        if bool((lows[name][: padded.get(name)] == 0).any()):
            raise _refusal(f"nothing in transformers' model fills all of vLLM's {name}")


def _compare(model: VllmModel, base: Tensors, found: Tensors, dtype: torch.dtype) -> None:
    """Let vLLM load the base, and see whether the views show it."""
    for _, parameter in model.named_parameters():
        parameter.data.zero_()
    device = next(iter(found.values())).device  # the base may be kept elsewhere
    _load(model, ((name, tensor.to(device).to(dtype)) for name, tensor in base.items()))
    for name, tensor in base.items():
        if not torch.equal(found[name], tensor.to(device).to(dtype)):
            raise _refusal(f"vLLM changes {name} when it loads it")


def _load(model: VllmModel, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    try:
        model.load_weights(weights)
    except Exception as error:
        raise _refusal(f"vLLM cannot load it ({type(error).__name__}: {reason(error)})") from error


def _refusal(why: str) -> InputError:
    return InputError(f"engine.name: vllm cannot share this model's weights: {why}; use engine.name=hf")
