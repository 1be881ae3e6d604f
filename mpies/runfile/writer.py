"""Writing the run file so that no kill, at any moment, can damage it.

HDF5 cannot be killed while it changes its own structure (space, indices, variable-length text): of
such a file, a kill left one in fifty unreadable. Nor can it stand a disk that becomes full under it.
So the structure (see `layout`) is changed on a copy in memory only, which is written out by plain means
and replaces the file in one rename (see `storage`). In between, a generation is committed by overwriting
rows that were allocated before, then by overwriting `generations_committed`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpies.errors import InputError, StorageError, reason
from mpies.runfile.checksum import find_damage, seal
from mpies.runfile.layout import (
    add_own_columns,
    add_start,
    allocate_rows,
    append_row,
    append_rows,
    complete_tables,
    evaluated_in,
    fill_evaluation,
    lay_out,
    missing_columns,
    name_dimensions,
    utc_now,
)
from mpies.runfile.reader import History, checked_history, damage_told, open_for_reading
from mpies.runfile.schema import CHECKSUM, COMMAND_TABLES, COSINE, METRIC, TABLES, column_name
from mpies.runfile.storage import commit, lock_folder, lock_given_back, made_folder, replace_file


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

        `start` is the first row of /start; `attributes`: the others of schema.ATTRIBUTES.
        Raises InputError if there is a run file already, or the place cannot be written to.
        """
        try:
            with made_folder(path.parent):
                lock = lock_folder(path)
                if path.exists():
                    os.close(lock)
                    raise InputError(f"run.directory: another job began a run in {path.parent} meanwhile")
                with lock_given_back(path, lock):
                    image = io.BytesIO()
                    with h5py.File(image, "w") as file:
                        lay_out(file, population, generations, attributes)
                        add_start(file, settings_yaml, start)
                        allocate_rows(file, generations)
                        name_dimensions(file)
                    replace_file(path, image)
                return cls(path, h5py.File(path, "r+", locking=False), generations, lock)
        except (OSError, RuntimeError, MemoryError) as error:
            raise InputError(f"run.directory: cannot write {path} ({reason(error)})") from None

    @classmethod
    def reopen(cls, path: Path, generations: int) -> RunFile:
        """An existing run file, to be continued to `generations`.

        Raises InputError if it is none, damaged, or in use by another job.
        """
        open_for_reading(path).close()
        lock = lock_folder(path)
        try:
            refuse_damage(path)
            # The lock is ours already; HDF5's own would keep readers out that do not know of it.
            return cls(path, h5py.File(path, "r+", locking=False), generations, lock)
        except (InputError, OSError) as error:
            os.close(lock)
            if isinstance(error, InputError):
                raise
            raise InputError(f"run.directory: cannot write {path} ({reason(error)})") from None

    @property
    def committed(self) -> int:
        """The number of committed generations."""
        return int(self.file.attrs["generations_committed"])

    @property
    def run_uuid(self) -> str:
        return str(self.file.attrs["run_uuid"])

    def history(self) -> History:
        """What determines the weights so far. Raises InputError if it cannot be read."""
        return checked_history(self.path, self.file)

    def evaluated(self) -> set[tuple[int, str]]:
        """(generation, split) of the evaluations that are there."""
        return evaluated_in(self.file)

    def start(self, settings_yaml: str, row: dict[str, Any]) -> None:
        """Note that a job starts to write: its settings and where it runs."""
        with self._restructured() as file:
            complete_tables(file)
            add_start(file, settings_yaml, row)
            allocate_rows(file, self.generations)

    def append(self, generation: dict[str, Any], members: dict[str, np.ndarray]) -> None:
        """Write the next generation's row and its members' rows (N,), and commit them.

        Beside the schema's columns, `generation` may have cosine_NAME and `members` metric_NAME: figures of
        the task, of which up to MOST_FIGURES get columns.
        """
        rows = [("generation", COSINE, generation), ("member", METRIC, members)]
        own = {
            f"{table}/{column_name(name)}": row[name]
            for table, prefix, row in rows
            for name in sorted(row)
            if name.startswith(prefix)
        }
        if new := missing_columns(self.file, own):
            with self._restructured() as file:
                add_own_columns(file, new)
        if self.committed == self._allocated():
            with self._restructured() as file:
                allocate_rows(file, self.generations)
        with self._storage_errors():
            index = self.committed
            for table, _, row in rows:
                for column in TABLES[table]:
                    if column.name != CHECKSUM:
                        self.file[table][column.name][index] = column.value(row)
            for name, value in own.items():
                if name in self.file:
                    self.file[name][index] = value
            seal(self.file, "generation", index, index + 1)
            # On the disk before they count, should the node die.
            commit(self.file)
            # modify() overwrites in place; assignment would delete and create.
            self.file.attrs.modify("generations_committed", index + 1)
            commit(self.file)

    def add_evaluation(
        self,
        row: dict[str, Any],
        samples: list[dict[str, Any]],
        metrics: list[dict[str, Any]] | None = None,
        prompts: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Add an evaluation, its further figures, the answers kept of it, and what each prompt came to."""
        with self._restructured() as file:
            append_row(file, "evaluation", row)
            for metric in metrics or []:
                append_row(file, "metric", metric)
            for sample in samples:
                append_row(file, "sample", sample)
            if prompts:
                append_rows(file, "prompt", prompts)

    def add_command(
        self,
        evaluations: list[dict[str, Any]],
        metrics: list[dict[str, Any]],
        samples: list[dict[str, Any]],
        figures: list[dict[str, Any]],
        answers: list[dict[str, Any]],
        prompts: Sequence[dict[str, np.ndarray]] = (),
    ) -> None:
        """Add what `mpies.evaluate` has measured: rows of the tables of these names.

        An evaluation that is there keeps its row, which only gets what it lacks of `kl` and `drift_l2`;
        its metrics, samples and prompts are not added again. One that has no `reward_mean` makes no new row.
        """
        with self._restructured() as file:
            complete_tables(file)
            complete_tables(file, COMMAND_TABLES)
            there = evaluated_in(file)
            for row in evaluations:
                fill_evaluation(file, row)
                if "reward_mean" in row and (row["generation"], row["split"]) not in there:
                    append_row(file, "evaluation", row)
            for table, rows in (("metric", metrics), ("sample", samples)):
                for row in rows:
                    if (row["generation"], row["split"]) not in there:
                        append_row(file, table, row)
            for part in prompts:
                if (int(part["generation"][0]), str(part["split"][0])) not in there:
                    append_rows(file, "prompt", part)
            for figure in figures:
                append_row(file, "figure", {"utc": utc_now(), **figure})
            for answer in answers:
                append_row(file, "answer", answer)

    def close(self) -> None:
        with self._storage_errors():
            commit(self.file)
            self.file.close()
        os.close(self._lock)

    def _allocated(self) -> int:
        return self.file["generation/digest"].shape[0]

    @contextlib.contextmanager
    def _restructured(self) -> Iterator[h5py.File]:
        """A copy of the file to change at will, which then replaces it and is written from then on."""
        with self._storage_errors():
            commit(self.file)
            image = io.BytesIO(self.path.read_bytes())
            with h5py.File(image, "r+") as file:
                yield file
                name_dimensions(file)
            replace_file(self.path, image)
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


def refuse_damage(path: Path) -> None:
    """Raise InputError if a run file is not as it was written, or could not be changed as a job does.

    Before a job has done anything for it, and before it is made worse.
    """
    with damage_told(path), h5py.File(io.BytesIO(path.read_bytes()), "r+") as file:
        damage = str(find_damage(file))
        if not damage:
            complete_tables(file)
            allocate_rows(file, int(file.attrs["generations_committed"]) + 1)
            name_dimensions(file)
    if damage:
        raise InputError(
            f"{path}: {damage}. Put back a copy of the file, or begin a new run in another run.directory;"
            " mpies.replay gives the weights of good generations"
        )
