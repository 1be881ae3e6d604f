"""Base weights and live weights of a model, one rank's copy.

The base is a tensor per parameter, float32 by default, and the only truth. The live weights are the model's
own parameters, in the dtype that the engine computes with; they are overwritten as a whole from the base,
`live <- cast(base + sigma * sign * noise)`, so there is nothing to restore and nothing that can drift.
Tied parameters are one tensor. Parameters that are left out of the tuning have live values only, which
stay as they are; they count in the digest as if they were in the base. Beyond base and live, no more than
one tensor's memory is needed; if the base is kept in the host's memory (storage.py), two tensors' instead
of the base's.

With a `master` of bfloat16 the base is kept in that, which halves its memory. A parameter is then
widened to float32 to be worked on, and an update is rounded to it once, up or down at random, so that
steps far smaller than bfloat16's spacing count on average. Those random bits, too, are a pure function
of the generation's first seed: everything stays exact.

An engine may hold the live weights in a model of its own; the transformers model then shares them:

    base = take_base(model, device, master)
    live = host.hold(model, base)           or room_for(base, dtype)
    weights = Weights(model, base, live, kernels, rank)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpies.errors import InputError
from mpies.model.storage import Tensors, pinned_room, room_on, storage_for
from mpies.noise import Kernels
from mpies.noise.definition import matrices_in, parameter_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASTERS = (torch.float32, torch.bfloat16)
TUNED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of checkpoints

# Of an update: seeds uint64 (D,), coefficients float32 (D,).
Terms = tuple[np.ndarray, np.ndarray]

# What may change a parameter's value, float32, at the end of its update: (name, value).
Pull = Callable[[str, torch.Tensor], None]


def take_base(
    model: torch.nn.Module,
    device: torch.device,
    master: torch.dtype = torch.float32,
    where: str = "device",
) -> Tensors:
    """Take a model's values out of it: the base weights on `device`, in the dtype `master`, by name.

    `where`: on a GPU's `host` instead, if it is a GPU; model.base.

    The model's parameters are empty afterwards, and the checkpoint's memory is free. Raises InputError for
    parameters that are not floating point (quantised models), and for a `master` of float16.
    """
    if master not in MASTERS:
        raise InputError(
            "model.master: live needs live weights in bfloat16, and here they are"
            f" {str(master).removeprefix('torch.')}; use model.master=float32, or model.dtype=bfloat16"
        )
    # Without duplicates: a tied parameter appears once, under its first state-dict name.
    parameters = dict(model.named_parameters(remove_duplicate=True))
    for name, parameter in parameters.items():
        if parameter.dtype not in TUNED:
            raise InputError(f"model: {name} is {parameter.dtype}; quantised models cannot be tuned")
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    on_host = where == "host" and device.type != "cpu"
    base = pinned_room(shapes, master) if on_host else {}
    for name, parameter in parameters.items():
        # A copy always, never a view of the checkpoint's memory, which may be a mapped file.
        room = base if on_host else room_on(device, {name: shapes[name]}, master)
        base[name] = uploaded_as(parameter.detach(), room[name])
        parameter.requires_grad_(False)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)
    return base


def kept_buffers(model: PreTrainedModel) -> Tensors:
    """What a checkpoint has besides parameters, by name: such as biases by which mixtures choose experts."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def uploaded_as(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`target`, with the values of a tensor of any dtype in it.

    To a GPU, the value goes in its own dtype, and without being waited for: a blocking copy would be
    converted on the CPU first, by one thread, into twice the bytes.
    """
    return target.copy_(value.to(target.device, non_blocking=target.device.type != "cpu"))


def room_for(base: Tensors, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Memory for live weights of `dtype`, by name, where no engine has any for them; not yet written."""
    return room_on(device, {name: tensor.shape for name, tensor in base.items()}, dtype)


def take_over(
    model: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    rank: int = 0,
    master: torch.dtype = torch.float32,
    where: str = "device",
) -> Weights:
    """The base and live weights of a model, the latter in memory of their own. Raises as `take_base`."""
    base = take_base(model, device, master, where)
    return Weights(model, base, room_for(base, dtype, device), kernels, rank)


class Weights:
    """The base weights of a model, and its live weights, which are the model's parameters from now on.

    `base` is what `take_base` took from the model. `live`: contiguous tensors in the base's shapes, on the
    device that is computed on, by name, to be written; they share a dtype, which the model has afterwards.
    `rank` is that of the noise of matrices, 0: full. Who writes the base or the live weights does it here.
    """

    def __init__(self, model: PreTrainedModel, base: Tensors, live: Tensors, kernels: Kernels, rank: int = 0):
        self.base = base
        self.live = live
        self.storage = storage_for(base, next(iter(live.values())).device)
        self.kernels = kernels
        self.rank = rank
        self.ids = _ids(list(base))
        self.shapes = {name: tensor.shape for name, tensor in base.items()}
        """Of all parameters, those that are left out as well."""
        self._parameters = dict(model.named_parameters(remove_duplicate=True))
        self.version = 0
        """Grows whenever the model is to compute otherwise: see `changed`."""
        self._lend(live)
        torch.nn.Module.to(model, self.device)  # buffers
        model.config.dtype = self.dtype
        self._live_is_base = False
        self._left_out = [
            self.kernels.digest(buffer.float().contiguous().view(-1), parameter_id(name))
            for name, buffer in kept_buffers(model).items()
            if buffer.is_floating_point()
        ]
        """What else of the model adds to the digest."""
        self.show_base()

    def leave_out(self, modules: Iterable[str]) -> None:
        """These modules' parameters are no longer tuned, nor in `base` and `live`; they stay in the model.

        `modules`: their paths, or names of parameters. A tied parameter is where its name says. The digest
        stays. Raises InputError for a path without parameters, and if none would be left.
        """
        chosen = {path: [name for name in self.base if _is_within(name, path)] for path in modules}
        for path, names in chosen.items():
            if not names:
                raise InputError(
                    f"es.leave_out: the model has no parameters in {path!r}; names are such as"
                    f" {next(iter(self.base))}"
                )
        self.show_base()
        left = dict.fromkeys(name for names in chosen.values() for name in names)
        if len(left) == len(self.base):
            raise InputError("es.leave_out: leaves out all parameters, so that nothing could be learned")
        for name in left:
            self._left_out.append(self.digest_of(name, self.storage.copy(name)))
            del self.base[name], self.live[name]

    @property
    def size(self) -> int:
        """The number of parameters that are tuned."""
        return sum(base.numel() for base in self.base.values())

    @property
    def dtype(self) -> torch.dtype:
        """That the model computes in: of the live weights, or of others that it is lent.

        A tower that is left out may be the model's first module, and keeps its own.
        """
        return self._parameters[next(iter(self.live))].dtype

    @property
    def device(self) -> torch.device:
        """That is computed on; the base may be kept elsewhere."""
        return next(iter(self.live.values())).device

    @property
    def master(self) -> torch.dtype:
        """The base's dtype."""
        return next(iter(self.base.values())).dtype

    def value(self, name: str) -> torch.Tensor:
        """The base of a parameter in float32, on the device.

        The base itself, or a copy if its dtype is another or it is kept elsewhere.
        """
        return self.storage.copy(name).float()

    def as_base(self, value: torch.Tensor) -> torch.Tensor:
        """What the base would hold of a value, in float32: a tensor of its own on the device."""
        room = torch.empty(value.shape, dtype=self.master, device=self.device)
        return uploaded_as(value, room).float()

    def changed(self) -> None:
        """From now on, the model computes otherwise: what was made with it before belongs to another.

        Every write does so here; who changes what is computed with these weights says it.
        """
        self.version += 1

    def _rewrite(self) -> None:
        self.changed()
        self._live_is_base = False

    def perturb(self, seed: int, scale: float) -> None:
        """live <- cast(base + scale * noise(seed)), scale being sigma * sign."""
        self.perturb_each(seed, dict.fromkeys(self.live, scale))

    def perturb_each(self, seed: int, scales: Mapping[str, float]) -> None:
        """The same with a scale for each of these parameters, by name; the others stay as they are."""
        self._rewrite()
        for name, base in self.storage.bring(scales):
            for part, start in _parts_of(base):
                target = self.live[name].view(-1)[start : start + part.numel()]
                self.kernels.perturb(part.float().view(-1), target, seed, self.ids[name], scales[name], start)

    def show_base(self) -> None:
        """live <- cast(base): the unperturbed model. Costs nothing if live shows the base already."""
        if not self._live_is_base:
            self.show(self.storage.bring(self.base))
            self._live_is_base = True

    def show(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """live <- cast(values), for (name, value) one by one, until anything else is shown; base stays."""
        self._rewrite()
        for name, value in values:
            self.live[name].copy_(value)

    @contextmanager
    def lending(self, values: Tensors) -> Iterator[None]:
        """For the time being, the model computes with these tensors of one dtype, by name; with all or some.

        With `base`, in float32 most often. The live weights stay as they are.
        """
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        self._lend(values)
        try:
            yield
        finally:
            self._lend(own)

    def _lend(self, values: Tensors) -> None:
        self.changed()
        for name, value in values.items():
            self._parameters[name].data = value

    def restore(self, name: str, value: torch.Tensor) -> None:
        """base <- value, for one parameter: that of a checkpoint."""
        self._rewrite()
        self.storage.settle()
        uploaded_as(value, self.base[name])

    def update(self, seeds: np.ndarray, coefficients: np.ndarray, pull: Pull | None = None) -> None:
        """base <- base + sum_d coefficient_d * noise(seeds_d), tensor by tensor, summed in the order given.

        seeds uint64 (D,), coefficients float32 (D,): see `es/directions.py`. Paper, section 3:
        decomposed in-place update. Without directions the base stays as it is. `pull` is called with
        each parameter's name and new value, float32, which it may change.
        """
        self._update(self.base, (seeds, coefficients), pull)

    def update_one(
        self, name: str, seeds: np.ndarray, coefficients: np.ndarray, pull: Pull | None = None
    ) -> None:
        """The same for one parameter."""
        self._update([name], (seeds, coefficients), pull)

    def _update(self, names: Iterable[str], terms: Terms, pull: Pull | None) -> None:
        self._rewrite()
        for name, base in self.storage.bring(names):
            for part, start in [(base, 0)] if pull else _parts_of(base):
                self._update_part(name, part, start, terms, pull)
            self.storage.keep(name, base)
        self.storage.settle()

    def _update_part(
        self, name: str, part: torch.Tensor, start: int, terms: Terms, pull: Pull | None = None
    ) -> None:
        """The same for a parameter's values from `start` on, rounded if their dtype is not float32."""
        value = part.float()
        self._add(name, value, terms, start)
        if pull:
            pull(name, value)
        if value is not part:
            first = int(terms[0][0]) if len(terms[0]) else 0
            self.kernels.round(value.view(-1), part.view(-1), first, self.ids[name], start)

    def show_updated(self, seeds: np.ndarray, coefficients: np.ndarray) -> None:
        """live <- cast(what `update` would make of the base), until anything else is shown; base stays."""
        self._rewrite()
        for name, base in self.storage.bring(self.base):
            for part, start in _matrices_of(base):
                made = part.clone()
                self._update_part(name, made, start, (seeds, coefficients))
                self.live[name].view(-1)[start : start + part.numel()].copy_(made.view(-1))

    def updated(self, name: str, seeds: np.ndarray, coefficients: np.ndarray) -> torch.Tensor:
        """What `update_one` would make of a parameter, before it is rounded: float32, of its own memory."""
        value = self.storage.copy(name).to(torch.float32, copy=True)
        self._add(name, value, (seeds, coefficients))
        return value

    def _add(self, name: str, value: torch.Tensor, terms: Terms, start: int = 0) -> None:
        """value <- value + sum_d coefficient_d * noise(seeds_d): a parameter's values from `start` on."""
        seeds, coefficients = terms
        if len(seeds) and self.rank and matrices_in(self.base[name].shape):
            first = start // math.prod(value.shape[-2:])
            for number, matrix in enumerate(value.view(-1, *value.shape[-2:])):
                self.kernels.lowrank_update(
                    matrix, seeds, coefficients, self.ids[name], self.rank, first + number
                )
        elif len(seeds):
            self.kernels.update(value.view(-1), seeds, coefficients, self.ids[name], start)

    def find_unfit(self) -> str | None:
        """The first parameter that cannot be computed with, and why; None if all can."""
        names = [name for name, base in self.base.items() if base.numel()]
        # All are asked before any answers: a GPU is waited for once.
        largest = torch.stack([_largest(base) for _, base in self.storage.bring(names)]).tolist()
        limit = torch.finfo(self.dtype).max
        for name, size in zip(names, largest, strict=True):
            if not math.isfinite(size):
                return f"{name} has values that are not finite"
            if size > limit:
                dtype = str(self.dtype).removeprefix("torch.")
                return f"{name} has values up to {size:.3g}, and {dtype} ends at {limit:.3g}"
        return None

    def digest(self) -> int:
        """64 bits that change with any bit of the base.

        Equal on CPU and GPU, for any order of work.
        """
        return self.whole_digest(
            self.kernels.digest(part.float().view(-1), self.ids[name], start)
            for name, base in self.storage.bring(self.base)
            for part, start in _parts_of(base)
        )

    def whole_digest(self, parts: Iterable[torch.Tensor]) -> int:
        """The digest, of what all tuned parameters add to it."""
        return sum_digests([*parts, *self._left_out])

    def digest_of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor of values adds to the digest if it is the base of that parameter; int64 ()."""
        return self.kernels.digest(tensor.float().view(-1), self.ids[name])


def sum_digests(parts: Iterable[torch.Tensor]) -> int:
    """The digest, below 2^64, that is made up of what the parameters add. A GPU is waited for once."""
    return int(torch.stack(list(parts)).sum()) % 2**64  # integers wrap


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _parts_of(base: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """A parameter's base, or parts of it, each with the place that it begins at.

    A stack that is widened to be worked on is widened matrix by matrix: a layer's experts are gigabytes.
    """
    return [(base, 0)] if base.dtype == torch.float32 else _matrices_of(base)


def _matrices_of(base: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """A stack's matrices, each with the place that it begins at; any other parameter as a whole."""
    if matrices_in(base.shape) < 2:
        return [(base, 0)]
    return [(part, number * part.numel()) for number, part in enumerate(base)]


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, float32 (); NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).float()


def _ids(names: list[str]) -> dict[str, int]:
    ids = {name: parameter_id(name) for name in names}
    if len(set(ids.values())) < len(ids):  # one model in 100,000 or so
        raise InputError("model: two parameter names hash to the same id, so their noise would be equal")
    return ids
