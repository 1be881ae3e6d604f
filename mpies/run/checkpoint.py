"""Weight checkpoints: the base of one generation as a safetensors file. They only save replay time.

The run file is the checkpoint of every generation; these spare a restart the replay from the initial
model. A checkpoint is written under a temporary name, synced and renamed; it carries the run's uuid
and its generation, and its digest is compared with the run file's before it is used.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mpies.errors import StorageError, reason
from mpies.files import written_whole
from mpies.model.weights import Weights

KEPT = 2
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # of a base's dtype, in the file
NAME = "checkpoint-{:06d}.safetensors"


def write(folder: Path, weights: Weights, run_uuid: str, generation: int) -> None:
    """Write the base of `generation` to the folder, tensor by tensor, and keep the newest two."""
    path = folder / NAME.format(generation)
    try:
        with written_whole(path) as file:
            file.write(_header(weights, {"run_uuid": run_uuid, "generation": str(generation)}))
            for base in weights.base.values():
                file.write(base.cpu().view(-1).view(torch.uint8).numpy().data)
        # Those of later generations are left from another run in this folder.
        numbers = _checkpoints(folder)
        kept = [number for number in numbers if number <= generation][:KEPT]
        for number in set(numbers) - set(kept):
            numbers[number].unlink()
    except OSError as error:
        raise StorageError(f"{path}: cannot write the checkpoint ({reason(error)})") from None


def restore(folder: Path, weights: Weights, run_uuid: str, digests: np.ndarray, limit: int, say=print) -> int:
    """Load the newest usable checkpoint of at most `limit` generations into the base.

    digests: uint64 (G,), the run file's. Returns its generation, 0 if there is none. A damaged
    checkpoint, or one of another run, is skipped with a message. Raises StorageError if the file ceases to be
    readable meanwhile.
    """
    for generation, path in _checkpoints(folder).items():
        if not 0 < generation <= limit:
            continue
        try:
            with safe_open(path, "pt") as file:
                problem = _problem(file, weights, run_uuid, generation, int(digests[generation - 1]))
        except (SafetensorError, OSError, ValueError) as error:
            problem = f"unreadable ({error})"
        if problem is None:
            _load(path, weights)
            return generation
        say(f"{path.name}: {problem}; skipped")
    return 0


def _load(path: Path, weights: Weights) -> None:
    """Into the base, a tensor at a time. Raises StorageError if what was read before cannot be read again."""
    try:
        with safe_open(path, "pt") as file:
            for name in weights.base:
                weights.restore(name, file.get_tensor(name))
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read a second time ({reason(error)}); try again") from None


def _problem(file, weights: Weights, run_uuid: str, generation: int, digest: int) -> str | None:
    """Why an open checkpoint cannot be used; None if it can. Reads it once, a tensor at a time."""
    metadata = file.metadata() or {}
    if metadata.get("run_uuid") != run_uuid or metadata.get("generation") != str(generation):
        return "it belongs to another run"
    if set(file.keys()) != set(weights.base):
        return "it holds other parameters"
    parts = []
    for name, base in weights.base.items():
        stored = file.get_tensor(name)
        if stored.shape != base.shape or stored.dtype != base.dtype:
            return f"it holds another {name}"
        parts.append(weights.digest_of(name, stored.to(weights.device, non_blocking=True)))
    return None if weights.whole_digest(parts) == digest else "damaged: its digest is not the run file's"


def _header(weights: Weights, metadata: dict[str, str]) -> bytes:
    """The head of a safetensors file: its length, then JSON, padded to 8 bytes."""
    entries: dict = {"__metadata__": metadata}
    offset = 0
    for name, base in weights.base.items():
        end = offset + base.numel() * base.element_size()
        entries[name] = {"dtype": NAMES[base.dtype], "shape": list(base.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checkpoints(folder: Path) -> dict[int, Path]:
    """generation -> file, newest first."""
    found = {}
    for path in folder.glob("checkpoint-*.safetensors"):
        number = path.stem.removeprefix("checkpoint-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items(), reverse=True))
