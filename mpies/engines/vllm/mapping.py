"""Where in vLLM's parameters a transformers model's parameters are.

vLLM fuses matrices (q, k and v; gate and up) and pads vocabularies, differently for every architecture.
Nothing here knows how: vLLM's own loader is given numbers instead of weights, every parameter's own
number in all its elements, and where they turn up is where the parameter lives. What is found are rows
of vLLM's tensors, so they are contiguous. That rows have not changed places on the way is checked with the
weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from mpies.engines.vllm.checkpoint import as_stored
from mpies.errors import InputError, reason
from mpies.model.weights import Tensors, kept_buffers

# A number is told in two digits, 1 to 80: every floating-point dtype holds them exactly, and float32 powers
# of e with them.
DIGITS = 80


class VllmModel(Protocol):
    """What is used of vLLM's model: a module's ways to its parts, and its own loader."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any: ...


class Made(NamedTuple):
    """Rows of vLLM's that are made of a parameter of transformers': a state's rates of their logarithms."""

    rows: torch.Tensor
    of: torch.Tensor
    """The live weights."""

    def remake(self) -> None:
        self.rows.copy_(-torch.exp(self.of.float()))


class Views(NamedTuple):
    live: Tensors
    """In the shapes and by the names of the base: vLLM's memory, but for what vLLM has made of them."""
    made: list[Made]


def find_views(
    model: VllmModel, base: Tensors, dtype: torch.dtype, theirs: PreTrainedModel, device: torch.device
) -> Views:
    """Views of vLLM's parameters, filled with cast(base).

    model: vLLM's, on `device`; theirs: transformers'. Raises InputError where a parameter is not in vLLM's
    model as it is in transformers', or where vLLM's model has parameters that nothing of transformers' fills.
    """
    own, fixed = dict(model.named_parameters()), kept_buffers(theirs)
    loader = Loader(model, theirs, device)
    numbers = {place: loader.numbers([*base.items(), *fixed.items()], place) for place in ("high", "low")}
    found = Views({}, [])
    for number, name in enumerate(base):
        high, low = (digit + 1 for digit in divmod(number, DIGITS))
        view = _view(name, base[name], own, numbers["high"], numbers["low"], high, low)
        if view is None:
            view = torch.empty(base[name].shape, dtype=dtype, device=device)
            rows = _view(name, base[name], own, numbers["high"], numbers["low"], -high, -low)
            if rows is None:
                raise _refusal(f"{name} is in none of vLLM's parameters")
            found.made.append(Made(rows, view))
        if view.dtype != dtype:
            raise _refusal(f"vLLM keeps {name} in {view.dtype}".replace("torch.", ""))
        found.live[name] = view
    _refuse_unfilled(model, own, numbers["low"])
    loader.load(((name, base[name].to(device).to(dtype)) for name in base), fixed.items())
    _compare(base, found)
    return found


def _compare(base: Tensors, found: Views) -> None:
    """Do the views show what vLLM has loaded of the base?"""
    for made in found.made:
        name = next(name for name, live in found.live.items() if live is made.of)
        made.of.copy_(base[name])
        loaded = made.rows.clone()
        made.remake()
        if not torch.equal(made.rows, loaded):
            raise _refusal(f"vLLM changes {name} when it loads it")
    for name, live in found.live.items():
        if not torch.equal(live, base[name].to(live.device).to(live.dtype)):
            raise _refusal(f"vLLM changes {name} when it loads it")


class Loader:
    """vLLM's own way to load a checkpoint, given what is no checkpoint."""

    def __init__(self, model: VllmModel, theirs: PreTrainedModel, device: torch.device):
        self.model, self.theirs, self.device = model, theirs, device

    def numbers(self, tensors: Sequence[tuple[str, torch.Tensor]], place: str) -> Tensors:
        """A digit of the number of the tensor that each row of vLLM's parameters is from; 0: of none.

        Below 0 where it is made of that tensor.

        On the CPU, where they are looked through: on a GPU, each look would have to be waited for.
        """

        def marked() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, tensor) in enumerate(tensors):
                digit = divmod(number, DIGITS)[place == "low"] + 1
                yield name, torch.full((), float(digit), device=self.device).expand(tensor.shape)

        self.load(marked())
        return {name: _digits(parameter.data) for name, parameter in self.model.named_parameters()}

    def load(self, *tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Into parameters that are all zero. Raises InputError if vLLM cannot."""
        for _, parameter in self.model.named_parameters():
            parameter.data.zero_()
        try:
            self.model.load_weights(as_stored(self.theirs, chain(*tensors)))
        except Exception as error:
            raise _refusal(f"vLLM cannot load it ({type(error).__name__}: {reason(error)})") from error


def _digits(loaded: torch.Tensor) -> torch.Tensor:
    """Of each row; vLLM may have taken digits for logarithms of rates below 0."""
    rows = (loaded.flatten(1)[:, 0] if loaded.dim() > 1 else loaded).cpu().float()
    return torch.where(rows < 0, -(-rows).log().round(), rows)


def _view(
    name: str,
    base: torch.Tensor,
    own: Mapping[str, nn.Parameter],
    highs: Tensors,
    lows: Tensors,
    high: int,
    low: int,
) -> torch.Tensor | None:
    """The rows of vLLM's parameters whose digits are `high` and `low`; None if there are none."""
    places = [
        (key, rows) for key in own if len(rows := ((highs[key] == high) & (lows[key] == low)).nonzero()[:, 0])
    ]
    if not places:
        return None
    if len(places) > 1:
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


def _refusal(why: str) -> InputError:
    return InputError(f"engine.name: vllm cannot share this model's weights: {why}; use engine.name=hf")
