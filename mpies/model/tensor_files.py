"""A model's safetensors files, read tensor by tensor, under the names that they have there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mpies.errors import InputError, reason
from mpies.model.folder import locate

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorFiles:
    """Those of a folder, or of a hub id in the local cache. Raises InputError if there are none."""

    def __init__(self, path: str):
        self._file_of = _files(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in its own memory and dtype. Raises KeyError, OSError or SafetensorError."""
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """The same of one index of its first dimension."""
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_slice(name)[row]


def _files(path: str) -> dict[str, Path]:
    """Tensor's name -> safetensors file."""
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
    place = Path(locate(path))
    if place.is_dir():
        return place / name if (place / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(path), name)
    return Path(found) if isinstance(found, str) else None
