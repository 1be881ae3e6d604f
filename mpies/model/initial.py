"""The initial weights, read again from where the model was loaded from: tensor by tensor, not kept.

For decay towards them (anchor.py), the drift from them, and the KL divergence to the initial model.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from mpies.errors import InputError, reason
from mpies.model import loading
from mpies.model.weights import Weights

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
        self._files = _files(path)
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
        with safe_open(self._files[name], "pt") as file:
            value = file.get_tensor(name)
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

    def __init__(self, path: str, digest: int | None):
        self._path, self._digest = path, digest

    def items(
        self, weights: Weights, names: Container[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `InitialFromFiles.items`. Raises InputError if another model is there meanwhile."""
        model, _ = loading.load(self._path, allow_download=False)
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


def find_initial(path: str, weights: Weights, digest: int | None) -> InitialWeights:
    """Where to read the initial weights with the digest `digest` (None: any) from.

    Raises InputError, now and not when they are needed, if they cannot be had.
    """
    loaded = InitialFromLoading(path, digest)
    if digest is None:  # it might be another kind of model, with weights of the same names among others
        next(loaded.items(weights))
    try:
        return InitialFromFiles(path, weights, digest)
    except InputError:
        next(loaded.items(weights))
        return loaded


def _files(path: str) -> dict[str, Path]:
    """Parameter name -> safetensors file. Raises InputError if there are no such files."""
    try:
        index = _file(path, INDEX)
        if index:
            shards = json.loads(index.read_text())["weight_map"]
            return {name: index.with_name(shard) for name, shard in shards.items()}
        single = _file(path, SINGLE)
        if single is None:
            raise OSError(f"there is neither {SINGLE} nor {INDEX}")
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"no safetensors files of {path} ({reason(error)})") from None


def _file(path: str, name: str) -> Path | None:
    """A file of a model folder, or of a hub id in the local cache; None if it is not there."""
    place = Path(loading.locate(path))
    if place.is_dir():
        return place / name if (place / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(path), name)
    return Path(found) if isinstance(found, str) else None
