"""Decay towards the initial weights, against forgetting (anchored weight decay, arXiv 2605.30148).

ES moves weights further than gradient methods do, mostly at random. After each update,
base <- base + decay * (initial - base). The initial weights are read from the model's safetensors
files, tensor by tensor, each time: on the way, memory for one tensor is needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mpies import model as models
from mpies.errors import InputError, reason
from mpies.weights import Weights

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Anchor:
    """The initial weights on disk, proved to be those with the digest `digest`.

    Raises InputError if the files do not hold the weights under their own names and in their shapes,
    as for models that transformers converts when it loads them.
    """

    def __init__(self, path: str, weights: Weights, digest: int):
        self._files = _files(path)
        try:
            found = sum(
                weights.digest_of(name, self.initial(name, base)) for name, base in weights.base.items()
            )
        except (KeyError, ValueError, OSError, SafetensorError) as error:
            raise InputError(
                f"es.anchor_decay: the initial weights cannot be read one by one from {path}"
                f" ({reason(error)}); set it to 0"
            ) from None
        if found % 2**64 != digest:
            raise InputError(
                f"es.anchor_decay: the files of {path} hold other values than the model has when it is"
                " loaded; set it to 0"
            )

    def initial(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The initial value of a parameter: float32, a tensor of its own, on the base's device."""
        with safe_open(self._files[name], "pt") as file:
            value = file.get_tensor(name)
        if value.shape != base.shape:
            raise ValueError(f"{name} has another shape there")
        return torch.empty_like(base).copy_(value)

    def pull(self, weights: Weights, decay: float) -> None:
        """Move all of the base by `decay` of the way towards the initial weights."""
        for name, base in weights.base.items():
            self.pull_one(base, self.initial(name, base), decay)

    @staticmethod
    def pull_one(base: torch.Tensor, initial: torch.Tensor, decay: float) -> None:
        """base <- base + decay * (initial - base); `initial` is overwritten.

        Three float32 operations, each rounded on its own, in this order on every device.
        """
        initial.sub_(base)
        initial.mul_(decay)
        base.add_(initial)


def _files(path: str) -> dict[str, Path]:
    """Parameter name -> safetensors file. Raises InputError if there are no such files."""
    try:
        index = _file(path, INDEX)
        if index:
            shards = json.loads(index.read_text())["weight_map"]
            return {name: index.with_name(shard) for name, shard in shards.items()}
        single = _file(path, SINGLE)
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"es.anchor_decay: no safetensors files of {path} ({reason(error)}); set it to 0"
        ) from None


def _file(path: str, name: str) -> Path | None:
    """A file of a model folder, or of a hub id in the local cache; None if it is not there."""
    place = Path(models.locate(path))
    if place.is_dir():
        return place / name if (place / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(path), name)
    return Path(found) if isinstance(found, str) else None
