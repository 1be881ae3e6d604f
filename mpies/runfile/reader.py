"""Reading run files: on any machine, also while a job writes them, or what is left of a truncated one."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np

from mpies.errors import InputError, reason
from mpies.es import fitness
from mpies.es.directions import directions
from mpies.runfile.checksum import Damage, find_damage, good_generations
from mpies.runfile.schema import PER_GENERATION, RUN_FILE, SCHEMA_VERSION, TABLES
from mpies.splits import HELD_OUT, TRAIN
from mpies.text import clip

# Where HDF5's version 0 superblock, the default, keeps the "end of file address".
END_OF_FILE = 40


# Rows that are read take no more than this many bytes, or this many times the file's size if that is more: a
# compressed copy is taken, a few bytes that claim to be terabytes are not.
READ_AT_MOST = 2**30
COMPRESSED = 1000

# What attributes can say that decide what is computed.
KNOWN = {"fitness": tuple(fitness.FITNESS), "dtype": ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class History:
    """The committed part of a run file that determines the weights, and where they began.

    seed uint64, sign int8, reward float64, coefficient float32: (G, N).
    alpha float64, anchor_decay float64, digest uint64, seconds float64: (G,). `settings` is the YAML of
    the first start.
    """

    run_uuid: str
    model_path: str
    model_digest: int
    dtype: str
    settings: str
    seed: np.ndarray
    sign: np.ndarray
    reward: np.ndarray
    coefficient: np.ndarray
    alpha: np.ndarray
    anchor_decay: np.ndarray
    digest: np.ndarray
    seconds: np.ndarray
    evaluated: dict[str, dict[int, float]]
    """Split -> generation -> mean reward of the evaluations."""
    fitness: str
    """How rewards became coefficients; see fitness.py."""
    data_digest: str = ""
    """SHA-256 of the task's rows; empty in files of versions that did not write it."""
    reward_digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the reward functions' files at the latest start, by name; empty in earlier files."""
    left_out: tuple[str, ...] = ()
    """Modules whose parameters are not tuned; none in earlier files."""
    model_class: str = ""
    """transformers' name for the class of the model; empty in earlier files."""
    damage: Damage = field(default_factory=Damage)
    """What of the file is not as it was written."""

    @property
    def generations(self) -> int:
        return len(self.digest)

    @property
    def held_out(self) -> dict[int, float]:
        """Mean held-out reward of the generations that were evaluated."""
        return self.evaluated.get(HELD_OUT, {})

    @property
    def unperturbed(self) -> float | None:
        """Mean reward on training prompts when they were last evaluated; None: never."""
        train = self.evaluated.get(TRAIN)
        return train[max(train)] if train else None

    def directions(self, generation: int) -> tuple[np.ndarray, np.ndarray]:
        """The seeds (D,) and factors (D,) of a generation's update, from its seeds and rewards."""
        return directions(self.seed[generation], self.sign[generation], self.coefficients(generation))

    def coefficients(self, generation: int) -> np.ndarray:
        """float32 (N,), from the rewards; `coefficient` is what was logged."""
        return fitness.coefficients(self.reward[generation], float(self.alpha[generation]), self.fitness)

    def first(self, generations: int) -> History:
        """The history up to there."""
        rows = ("seed", "sign", "reward", "coefficient", "alpha", "anchor_decay", "digest", "seconds")
        evaluated = {
            split: {g: reward for g, reward in rewards.items() if g <= generations}
            for split, rewards in self.evaluated.items()
        }
        return replace(self, evaluated=evaluated, **{row: getattr(self, row)[:generations] for row in rows})


def refuse_unknown(path: Path | str, history: History) -> None:
    """Raise InputError where a damaged file names what the program does not know."""
    for name, known in KNOWN.items():
        if getattr(history, name) not in known:
            value = clip(getattr(history, name), 40)
            raise InputError(f"{path}: a damaged run file ({name} is {value!r}, not {' or '.join(known)})")


def path_of(place: Path | str) -> Path:
    """The run file that is meant: the file itself, or that of a run's folder."""
    path = Path(place).expanduser()
    try:
        return path / RUN_FILE if path.is_dir() else path
    except OSError as error:  # a name that is too long
        raise InputError(f"{clip(str(place))}: cannot be ({reason(error)})") from None


def read_history(path: Path | str) -> History:
    """Read a run file's history, also while a job writes it. Raises InputError if it cannot be read.

    What can be read, and is not as it was written, is in its `damage`.
    """
    with open_for_reading(path) as file:
        return checked_history(path, file)


def salvage_history(path: Path | str) -> History:
    """What can be had from a truncated run file: its generations up to the first incomplete one.

    The missing end is read as zeros, which no seed or digest is. Raises InputError if more than half
    is missing: then the structure is gone, in which HDF5 can lose itself for ever.
    """
    data = Path(path).read_bytes()
    end = int.from_bytes(data[END_OF_FILE : END_OF_FILE + 8], "little")
    if 2 * len(data) < end:
        raise InputError(f"{path}: too little is left of it to salvage, {len(data)} of {end} bytes")
    with damage_told(path), h5py.File(io.BytesIO(data + bytes(end - len(data))), "r") as file:
        _require_run_file(path, file)
        history = history_of(file, evaluations=False)
        good = good_generations(file)
    whole = (history.seed != 0).all(axis=1) & (abs(history.sign) == 1).all(axis=1) & (history.digest != 0)
    return history.first(int(min(good, float(np.argmin(np.append(whole, False))))))


@contextlib.contextmanager
def damage_told(path: Path | str):
    """h5py's many errors for damaged files as an InputError."""
    try:
        yield
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{path}: a damaged run file ({reason(error)})") from None


def checked_history(path: Path | str, file: h5py.File) -> History:
    """The history in an open run file. Raises InputError if it cannot be read."""
    with damage_told(path):
        return replace(history_of(file), damage=find_damage(file))


def history_of(file: h5py.File, evaluations: bool = True) -> History:
    committed = int(file.attrs["generations_committed"])
    return History(
        run_uuid=str(file.attrs["run_uuid"]),
        model_path=str(file.attrs["model_path"]),
        model_digest=int(file.attrs["model_digest"]),
        dtype=str(file.attrs["dtype"]),
        settings=file["config/000"].asstr()[()],
        anchor_decay=_anchor_decay(file, committed),
        fitness=str(file.attrs.get("fitness", "zscore")),
        data_digest=str(file.attrs.get("data_digest", "")),
        reward_digests=_reward_digests(file),
        left_out=tuple(str(file.attrs.get("left_out", "")).split()),
        model_class=str(file.attrs.get("model_class", "")),
        evaluated=_evaluated(file, committed) if evaluations else {},
        **{row: file[f"member/{row}"][:committed] for row in ("seed", "sign", "reward", "coefficient")},
        **{row: file[f"generation/{row}"][:committed] for row in ("alpha", "digest", "seconds")},
    )


def _reward_digests(file: h5py.File) -> dict[str, str]:
    """Of the latest start; versions before 0.2.0 did not note them."""
    table = file["start"]
    text = table["rewards"].asstr()[-1] if "rewards" in table else ""
    try:
        return dict(json.loads(text or "{}"))
    except (ValueError, TypeError):  # damaged, which its checksum tells
        return {}


def _anchor_decay(file: h5py.File, committed: int) -> np.ndarray:
    """0 for generations that were written by a version without it."""
    table = file["generation"]
    if "anchor_decay" not in table:
        return np.zeros(committed)
    return np.nan_to_num(table["anchor_decay"][:committed])


def _evaluated(file: h5py.File, committed: int) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    table = file["evaluation"]
    columns = table["generation"][:], table["split"].asstr()[:], table["reward_mean"][:]
    for g, split, reward in zip(*(column.tolist() for column in columns), strict=True):
        if g <= committed and math.isfinite(reward):
            found.setdefault(split, {})[g] = reward
    return found


class TruncatedError(InputError):
    """The end of a run file is missing."""


def open_for_reading(path: Path | str) -> h5py.File:
    """Open a run file read-only, also while a job writes it. Raises InputError if it is none."""
    try:
        file = _open(path)
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a run file") from None
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        if "truncated file" in str(error):
            raise TruncatedError(f"{path}: its end is missing; mpies.replay can salvage the rest") from None
        raise InputError(f"{clip(str(path))}: not a readable HDF5 file ({clip(reason(error))})") from None
    try:
        with damage_told(path):
            _require_run_file(path, file)
    except InputError:
        file.close()
        raise
    return file


def _open(path: Path | str) -> h5py.File:
    if os.path.isdir(path):
        raise IsADirectoryError
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # In a notebook that has the file open already, in h5py's or xarray's own way.
        if "locking flag values don't match" not in str(error):
            raise
        return h5py.File(path, "r")


def _require_run_file(path: Path | str, file: h5py.File) -> None:
    version = file.attrs.get("schema_version")
    if file.attrs.get("program") != "mpies" or not isinstance(version, np.integer):
        raise InputError(f"{path}: an HDF5 file, but not a run file of mpies")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema {version} is newer than this program's {SCHEMA_VERSION}; update mpies"
        )
    if version < 1:
        raise InputError(f"{path}: a damaged run file (schema {version})")
    _refuse_impossible_sizes(path, file)


def _refuse_impossible_sizes(path: Path | str, file: h5py.File) -> None:
    """Before anything of the file is read into memory."""
    committed, population = file.attrs["generations_committed"], file.attrs["population"]
    columns = [
        file[table][c.name] for table in PER_GENERATION for c in TABLES[table] if c.name in file[table]
    ]
    rows, members = min(map(len, columns)), file["member/seed"].shape[1]
    if not 0 <= committed <= rows or members != population:
        raise InputError(
            f"{path}: a damaged run file (it says that there are {committed} generations of {population}"
            f" members, and holds {rows} of {members})"
        )
    claimed = {}
    for group in file.values():
        for dataset in group.values() if isinstance(group, h5py.Group) else [group]:
            if not isinstance(dataset, h5py.Dataset):  # a link that leads nowhere
                continue
            claimed[dataset.name] = dataset.size * dataset.dtype.itemsize
    largest = max(claimed, key=claimed.__getitem__)
    if claimed[largest] > max(READ_AT_MOST, COMPRESSED * file.id.get_filesize()):
        raise InputError(
            f"{path}: a damaged run file ({largest} claims {claimed[largest]} bytes, more than there can be)"
        )
