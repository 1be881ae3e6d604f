"""Writing the run file so that no kill, at any moment, can damage it.

HDF5 cannot be killed while it changes its own structure (space, indices, variable-length text): of
such a file, a kill left one in fifty unreadable. Nor can it stand a disk that becomes full under it.
So the structure is changed on a copy in memory only, which is written out by plain means and replaces
the file in one rename. In between, a generation is committed by overwriting rows that were allocated
before, then by overwriting `generations_committed`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import mpies
from mpies.errors import InputError, StorageError, reason
from mpies.runfile.reader import History, checked_history, open_for_reading
from mpies.runfile.schema import (
    COMMAND_DIMENSIONS,
    COMMAND_TABLES,
    DIMENSIONS,
    SCHEMA_VERSION,
    TABLES,
    TEXT,
    Column,
)

ALL_TABLES, ALL_DIMENSIONS = TABLES | COMMAND_TABLES, DIMENSIONS | COMMAND_DIMENSIONS

# Rows are allocated for all generations at once, or for this many bytes and then twice as many.
ALLOCATION = 4 * 2**20


class RunFile:
    """The writer. Kept open by rank 0 for as long as the job runs.

    Every method that writes raises StorageError when the file cannot be written; what was committed
    before stays whole.
    """

    def __init__(self, path: Path, file: h5py.File, generations: int, lock: int):
        self.path = path
        self.file = file
        self.generations = generations
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: Path,
        settings_yaml: str,
        start: dict[str, Any],
        *,
        population: int,
        generations: int,
        **attributes: Any,
    ) -> RunFile:
        """A new run file for `generations` rows; it appears under its name only when it is whole.

        `start` is the first row of /start; `attributes`: model_path, model_digest, parameters, dtype.
        Raises InputError if there is a run file already, or the place cannot be written to.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            if path.exists():
                raise InputError(f"run.directory: another job began a run in {path.parent} meanwhile")
            image = io.BytesIO()
            with h5py.File(image, "w") as file:
                _lay_out(file, population, attributes)
                _add_start(file, settings_yaml, start)
                _allocate(file, generations)
                _name_dimensions(file)
            _replace(path, image)
            return cls(path, h5py.File(path, "r+", locking=False), generations, lock)
        except (OSError, RuntimeError) as error:
            raise InputError(f"run.directory: cannot write {path} ({reason(error)})") from None

    @classmethod
    def reopen(cls, path: Path, generations: int) -> RunFile:
        """An existing run file, to be continued to `generations`.

        Raises InputError if it is none, damaged, or in use by another job.
        """
        open_for_reading(path).close()
        lock = _lock(path)
        try:
            # The lock is ours already; HDF5's own would keep readers out that do not know of it.
            return cls(path, h5py.File(path, "r+", locking=False), generations, lock)
        except OSError as error:
            raise InputError(f"run.directory: cannot write {path} ({reason(error)})") from None

    @property
    def committed(self) -> int:
        """The number of committed generations."""
        return int(self.file.attrs["generations_committed"])

    @property
    def run_uuid(self) -> str:
        return str(self.file.attrs["run_uuid"])

    def history(self) -> History:
        """What determines the weights so far."""
        return checked_history(self.path, self.file)

    def evaluated(self) -> set[tuple[int, str]]:
        """(generation, split) of the evaluations that are there."""
        return _evaluated(self.file)

    def start(self, settings_yaml: str, row: dict[str, Any]) -> None:
        """Note that a job starts to write: its settings and where it runs."""
        with self._restructured() as file:
            _complete(file)
            _add_start(file, settings_yaml, row)
            _allocate(file, self.generations)

    def append(self, generation: dict[str, Any], members: dict[str, np.ndarray]) -> None:
        """Write the next generation's row and its members' rows (N,), and commit them."""
        if self.committed == self._allocated():
            with self._restructured() as file:
                _allocate(file, self.generations)
        with self._storage_errors():
            index = self.committed
            for table, row in (("generation", generation), ("member", members)):
                for column in TABLES[table]:
                    self.file[table][column.name][index] = row[column.name]
            # On the disk before they count, should the node die.
            _commit(self.file)
            # modify() overwrites in place; assignment would delete and create.
            self.file.attrs.modify("generations_committed", index + 1)
            _commit(self.file)

    def log_seconds(self, seconds: float) -> None:
        """What writing the last committed row took; it is on disk with the next flush."""
        with self._storage_errors():
            self.file["generation/seconds_log"][self.committed - 1] = seconds

    def add_evaluation(
        self, row: dict[str, Any], samples: list[dict[str, Any]], metrics: list[dict[str, Any]] | None = None
    ) -> None:
        """Add an evaluation, its further figures and the answers kept of it."""
        with self._restructured() as file:
            _append(file, "evaluation", row)
            for metric in metrics or []:
                _append(file, "metric", metric)
            for sample in samples:
                _append(file, "sample", sample)

    def add_command(
        self,
        evaluations: list[dict[str, Any]],
        metrics: list[dict[str, Any]],
        samples: list[dict[str, Any]],
        figures: list[dict[str, Any]],
        answers: list[dict[str, Any]],
    ) -> None:
        """Add what `mpies.evaluate` has measured: rows of the tables of these names.

        An evaluation that is there keeps its row, which only gets what it lacks of `kl` and `drift_l2`;
        its metrics and samples are not added again. One that has no `reward_mean` makes no new row.
        """
        with self._restructured() as file:
            _complete(file)
            _complete(file, COMMAND_TABLES)
            there = _evaluated(file)
            for row in evaluations:
                _fill(file, row)
                if "reward_mean" in row and (row["generation"], row["split"]) not in there:
                    _append(file, "evaluation", row)
            for table, rows in (("metric", metrics), ("sample", samples)):
                for row in rows:
                    if (row["generation"], row["split"]) not in there:
                        _append(file, table, row)
            for figure in figures:
                _append(file, "figure", {"utc": _utc_now(), **figure})
            for answer in answers:
                _append(file, "answer", answer)

    def close(self) -> None:
        with self._storage_errors():
            _commit(self.file)
            self.file.close()
        os.close(self._lock)

    def _allocated(self) -> int:
        return self.file["generation/digest"].shape[0]

    @contextlib.contextmanager
    def _restructured(self) -> Iterator[h5py.File]:
        """A copy of the file to change at will, which then replaces it and is written from then on."""
        with self._storage_errors():
            _commit(self.file)
            image = io.BytesIO(self.path.read_bytes())
            with h5py.File(image, "r+") as file:
                yield file
                _name_dimensions(file)
            _replace(self.path, image)
            self.file.close()
            self.file = h5py.File(self.path, "r+", locking=False)

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            if not self._in_place():
                raise FileNotFoundError("it was removed or replaced while the job ran")
            yield
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"{self.path}: cannot write the run file ({reason(error)}); the generations committed"
                " before are safe, and once that is mended, the same command goes on"
            ) from None

    def _in_place(self) -> bool:
        descriptor = self.file.id.get_vfd_handle()
        return self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(descriptor))


def _lay_out(file: h5py.File, population: int, attributes: dict[str, Any]) -> None:
    """The schema's attributes and empty tables."""
    file.attrs.update(
        schema_version=SCHEMA_VERSION,
        program="mpies",
        program_version=mpies.__version__,
        run_uuid=str(uuid.uuid4()),
        created_utc=_utc_now(),
        population=population,
        generations_committed=0,
        **attributes,
    )
    file.create_group("config")
    _complete(file)
    # Before there are rows, so that the structure stays at the front, where a truncated file has it.
    _name_dimensions(file)


def _evaluated(file: h5py.File) -> set[tuple[int, str]]:
    table = file["evaluation"]
    return set(zip(table["generation"][:].tolist(), table["split"].asstr()[:], strict=True))


def _fill(file: h5py.File, row: dict[str, Any]) -> None:
    """Give the evaluation of that generation and split what it lacks of KL and drift."""
    table = file["evaluation"]
    splits = table["split"].asstr()[:] == row["split"]
    for i in np.flatnonzero(splits & (table["generation"][:] == row["generation"])):
        for name in ("kl", "drift_l2"):
            if np.isnan(table[name][i]):
                table[name][i] = row[name]


def _complete(file: h5py.File, tables: dict[str, list[Column]] = TABLES) -> None:
    """Create the tables and columns that are not there: all, or what an earlier version did not have.

    Rows that are there get the fill value: NaN, 0 or an empty text.
    """
    population = int(file.attrs["population"])
    for table, columns in tables.items():
        width = (population,) if table == "member" else ()
        rows = max((len(dataset) for dataset in file.get(table, {}).values()), default=0)
        for column in columns:
            if f"{table}/{column.name}" not in file:
                _create_dataset(file, f"{table}/{column.name}", column, width)
                file[table][column.name].resize(rows, axis=0)


def _create_dataset(file: h5py.File, name: str, column: Column, width: tuple[int, ...]) -> None:
    rows = max(1, min(256, 4096 // (width[0] if width else 1)))
    dataset = file.create_dataset(
        name,
        shape=(0, *width),
        maxshape=(None, *width),
        chunks=(rows, *width),
        dtype=column.dtype,
        fillvalue=np.nan if np.dtype(column.dtype).kind == "f" else None,
    )
    dataset.attrs["description"] = column.description
    dataset.attrs["units"] = column.units


def _add_start(file: h5py.File, settings_yaml: str, row: dict[str, Any]) -> None:
    config, committed = file["config"], int(file.attrs["generations_committed"])
    config[f"{len(config):03d}"] = settings_yaml
    _append(file, "start", {"generation": committed, "utc": _utc_now(), **row})


def _allocate(file: h5py.File, generations: int) -> None:
    """Make room for more generations, and empty what a killed job left beyond the committed rows."""
    committed = int(file.attrs["generations_committed"])
    row_bytes = sum(d.dtype.itemsize * d.shape[1] for d in file["member"].values())
    rows = max(2 * committed, ALLOCATION // row_bytes, 1)
    rows = max(committed, min(generations, rows))
    for table in ("generation", "member"):
        for dataset in file[table].values():
            dataset.resize(rows, axis=0)
            dataset[committed:] = dataset.fillvalue


def _append(file: h5py.File, table: str, row: dict[str, Any]) -> None:
    for column in ALL_TABLES[table]:
        dataset = file[table][column.name]
        value = row[column.name]
        if column.dtype is TEXT:
            # HDF5 strings end at a NUL and hold no half of a surrogate pair.
            value = str(value).replace("\0", "\ufffd").encode(errors="replace").decode()
        dataset.resize(dataset.shape[0] + 1, axis=0)
        dataset[-1] = value


def _name_dimensions(file: h5py.File) -> None:
    """Bring the dimension scales to their datasets' length, and attach them where they are not.

    This changes the file's structure, so it belongs to the changes that are made on a copy in memory.
    A file of a writer that knew no dimensions gets them, too.
    """
    for table in ALL_TABLES.keys() & file.keys():
        for column in ALL_TABLES[table]:
            dataset = file[table][column.name]
            for axis, name in enumerate(ALL_DIMENSIONS[table]):
                if name not in file:
                    _create_scale(file, name)
                scale = file[name]
                if scale.shape[0] != dataset.shape[axis]:
                    scale.resize(dataset.shape[axis], axis=0)
                    scale[:] = np.arange(dataset.shape[axis])
                if not h5py.h5ds.get_num_scales(dataset.id, axis):
                    dataset.dims[axis].attach_scale(scale)


def _create_scale(file: h5py.File, name: str) -> None:
    scale = file.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1024,), dtype="i8")
    scale.attrs["description"] = "row numbers, from 0; names this dimension of other datasets"
    scale.attrs["units"] = "1"
    scale.make_scale(name)


def _commit(file: h5py.File) -> None:
    """To the disk, past the node's memory."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())


def _replace(path: Path, image: io.BytesIO) -> None:
    """Write the file as a whole: under another name, to the disk, then renamed."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            file.write(image.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(path: Path, patience: float = 10.0) -> int:
    """Take the run directory for this job until it ends: a descriptor that holds the lock.

    A job that was just killed may hold it for some seconds more.
    """
    try:
        descriptor = os.open(path.with_name("run.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"run.directory: cannot write to {path.parent} ({reason(error)})") from None
    start = time.monotonic()
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except (BlockingIOError, PermissionError):
            if time.monotonic() - start > patience:
                os.close(descriptor)
                raise InputError(f"run.directory: {path.parent} is in use by another job") from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return descriptor


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
