"""Reading run files: on any machine, also while a job writes them, or what is left of a truncated one."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from mpies.errors import InputError, reason
from mpies.runfile.schema import SCHEMA_VERSION

# Where HDF5's version 0 superblock, the default, keeps the "end of file address".
END_OF_FILE = 40


@dataclass(frozen=True)
class History:
    """The committed part of a run file that determines the weights, and where they began.

    seed uint64, sign int8, coefficient float32: (G, N); digest uint64: (G,). `settings` is the YAML
    of the first start.
    """

    run_uuid: str
    model_path: str
    model_digest: int
    dtype: str
    settings: str
    seed: np.ndarray
    sign: np.ndarray
    coefficient: np.ndarray
    digest: np.ndarray
    seconds: np.ndarray
    held_out: dict[int, float]
    """Mean held-out reward of the generations that were evaluated."""

    @property
    def generations(self) -> int:
        return len(self.digest)

    def first(self, generations: int) -> History:
        """The history up to there."""
        rows = ("seed", "sign", "coefficient", "digest", "seconds")
        held_out = {g: reward for g, reward in self.held_out.items() if g <= generations}
        return replace(self, held_out=held_out, **{row: getattr(self, row)[:generations] for row in rows})


def read_history(path: Path | str) -> History:
    """Read a run file's history, also while a job writes it. Raises InputError if it is damaged."""
    with open_for_reading(path) as file:
        return _checked_history(path, file)


def salvage_history(path: Path | str) -> History:
    """What can be had from a truncated run file: its generations up to the first incomplete one.

    The missing end is read as zeros, which no seed or digest is.
    """
    data = Path(path).read_bytes()
    end = int.from_bytes(data[END_OF_FILE : END_OF_FILE + 8], "little")
    with h5py.File(io.BytesIO(data + bytes(max(0, end - len(data)))), "r") as file:
        _require_run_file(path, file)
        history = _checked_history(path, file)
    whole = (history.seed != 0).all(axis=1) & (history.digest != 0)
    return history.first(int(np.argmin(np.append(whole, False))))


def _checked_history(path: Path | str, file: h5py.File) -> History:
    try:
        return history_of(file)
    except (OSError, KeyError, RuntimeError, IndexError) as error:
        raise InputError(f"{path}: a damaged run file ({reason(error)})") from None


def history_of(file: h5py.File) -> History:
    committed = int(file.attrs["generations_committed"])
    members = {name: file[f"member/{name}"][:committed] for name in ("seed", "sign", "coefficient")}
    return History(
        run_uuid=str(file.attrs["run_uuid"]),
        model_path=str(file.attrs["model_path"]),
        model_digest=int(file.attrs["model_digest"]),
        dtype=str(file.attrs["dtype"]),
        settings=file["config/000"].asstr()[()],
        digest=file["generation/digest"][:committed],
        seconds=file["generation/seconds"][:committed],
        held_out=_held_out(file, committed),
        **members,
    )


def _held_out(file: h5py.File, committed: int) -> dict[int, float]:
    table = file["evaluation"]
    try:
        columns = table["generation"][:], table["split"].asstr()[:], table["reward_mean"][:]
    except (OSError, RuntimeError):  # damaged; the weights do not depend on it
        return {}
    rows = zip(*(column.tolist() for column in columns), strict=False)
    return {g: reward for g, split, reward in rows if split == "held_out" and g <= committed}


class TruncatedError(InputError):
    """The end of a run file is missing."""


def open_for_reading(path: Path | str) -> h5py.File:
    """Open a run file read-only, also while a job writes it. Raises InputError if it is none."""
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        if "truncated file" in str(error):
            raise TruncatedError(f"{path}: its end is missing; mpies.replay can salvage the rest") from None
        raise InputError(f"{path}: not a readable HDF5 file ({reason(error)})") from None
    _require_run_file(path, file)
    return file


def _require_run_file(path: Path | str, file: h5py.File) -> None:
    version = file.attrs.get("schema_version")
    if file.attrs.get("program") != "mpies" or version is None:
        raise InputError(f"{path}: an HDF5 file, but not a run file of mpies")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema {version} is newer than this program's {SCHEMA_VERSION}; update mpies"
        )
