"""The initial weights, read again from where the model was loaded from: tensor by tensor, not kept.

For decay towards them (anchor.py), the drift from them, and the KL divergence to the initial model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Protocol

import torch
from safetensors import SafetensorError

from mpies.errors import InputError, reason
from mpies.model import loading
from mpies.model.tensor_files import TensorFiles
from mpies.model.weights import Weights


class InitialWeights(Protocol):
    """Where the initial weights are read from: their files, or the model loaded again."""

    def items(
        self, weights: Weights, names: Container[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, initial value) of all parameters, or of those in `names`, one at a time.

        A value is a float32 tensor of its own, on the weights' device.
        """
        ...


class InitialFromFiles:
    """The initial weights in the model's safetensors files, proved to be those with the digest `digest`.

    Without a digest, any weights of these names and shapes will do.

    On the way, memory for one tensor is needed. Raises InputError if the files do not hold the weights
    under their own names and in their shapes, as for models that transformers converts when it loads
    them.
    """

    def __init__(self, path: str, weights: Weights, digest: int | None):
        self._files = TensorFiles(path)
        try:
            found = weights.whole_digest(
                weights.digest_of(name, value) for name, value in self.items(weights)
            )
        except (KeyError, ValueError, OSError, SafetensorError) as error:
            raise InputError(
                f"the initial weights cannot be read one by one from {path} ({reason(error)})"
            ) from None
        if digest is not None and found != digest:
            raise InputError(f"the files of {path} hold other values than the model has when it is loaded")

    def read(self, name: str, weights: Weights) -> torch.Tensor:
        """The initial value of a parameter: float32, a tensor of its own, on the weights' device."""
        value = self._files.read(name)
        if value.shape != weights.base[name].shape:
            raise ValueError(f"{name} has another shape there")
        return weights.as_base(value)

    def items(
        self, weights: Weights, names: Container[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, initial value) of all parameters, or of those in `names`, one at a time."""
        for name in weights.base:
            if names is None or name in names:
                yield name, self.read(name, weights)


class InitialFromLoading:
    """The same for models whose files do not hold the weights one by one: loads the model each time.

    While it is iterated over, a second copy of the model in its checkpoint's dtype is in memory.
    """

    def __init__(self, path: str, digest: int | None, model_class: str):
        self._path, self._digest, self._model_class = path, digest, model_class

    def items(
        self, weights: Weights, names: Container[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `InitialFromFiles.items`. Raises InputError if another model is there meanwhile."""
        model, _ = loading.load(self._path, False, self._model_class)
        values = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=True)}
        shapes = {name: value.shape for name, value in values.items()}
        if shapes != weights.shapes:
            raise InputError(f"{self._path}: has other parameters than the model that it is compared with")
        if self._digest is not None and self._found(weights, values) != self._digest:
            raise InputError(f"model.path: {self._path} has changed since the job began")
        for name in weights.base:
            if names is None or name in names:
                yield name, weights.as_base(values[name])

    @staticmethod
    def _found(weights: Weights, values: dict[str, torch.Tensor]) -> int:
        return weights.whole_digest(
            weights.digest_of(name, weights.as_base(values[name])) for name in weights.base
        )


def find_initial(path: str, weights: Weights, digest: int | None, model_class: str) -> InitialWeights:
    """Where to read the initial weights with the digest `digest` (None: any) from.

    `model_class`: transformers' name for the class of the model that the weights are of.

    Raises InputError, now and not when they are needed, if they cannot be had.
    """
    loaded = InitialFromLoading(path, digest, model_class)
    if digest is None:  # it might be another kind of model, with weights of the same names among others
        next(loaded.items(weights))
    try:
        return InitialFromFiles(path, weights, digest)
    except InputError:
        next(loaded.items(weights))
        return loaded
