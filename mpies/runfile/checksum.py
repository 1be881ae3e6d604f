"""Checksums: a row of the run file is as it was written, or it is named.

A row's checksum is 64 bits of BLAKE2b over the row's number and values. A generation's goes over its
members' values, too; a start's also over its settings and over the file's attributes. The dataset's
attribute `covers` names the columns, so that columns which others add do no harm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import h5py
import numpy as np

from mpies.runfile.schema import ALL_TABLES, ATTRIBUTES, CHECKSUM, COSINE, METRIC

COVERS = "covers"
NAMED = 5
"""Damaged rows of a table that are named; of more, it is said how many there are."""


@dataclass(frozen=True)
class Damage:
    """What is not as it was written."""

    good: float = math.inf
    """Generations before the first damaged one; infinite: none is."""
    damaged: tuple[str, ...] = ()
    """What is damaged, in words."""
    uncounted: int = 0
    """Whole generations beyond the counter. One is what a killed job may leave."""

    def __str__(self) -> str:
        if not self.damaged:
            return ""
        good = f"generations 1 to {self.good} are good" if self.good else "no generation is good"
        good = "all generations are good" if self.good == math.inf else good
        return f"damaged: {', '.join(self.damaged)}; {good}"


def cover(file: h5py.File, table: str) -> None:
    """Note which columns the table's checksums go over: those of the schema, and of the task's figures."""
    names = [f"{table}/{column.name}" for column in ALL_TABLES[table] if column.name != CHECKSUM]
    if table == "generation":
        names += [f"member/{column.name}" for column in ALL_TABLES["member"]]
        names += own_columns(file)
    file[table][CHECKSUM].attrs[COVERS] = " ".join(names)


def covered(file: h5py.File, table: str) -> list[str]:
    """The columns that the table's checksums go over."""
    return str(file[table][CHECKSUM].attrs[COVERS]).split()


def own_columns(file: h5py.File) -> list[str]:
    """The columns of the task's figures, in the order of their names."""
    prefixes = {"generation": COSINE, "member": METRIC}
    return [
        f"{table}/{name}" for table, own in prefixes.items() for name in file[table] if name.startswith(own)
    ]


def seal(file: h5py.File, table: str, first: int = 0, last: int | None = None) -> None:
    """Write the checksums of a table's rows [first, last), or of all."""
    checksum = file[table][CHECKSUM]
    last = len(checksum) if last is None else last
    if last > first:
        checksum[first:last] = checksums(file, table, first, last)


def checksums(file: h5py.File, table: str, first: int, last: int) -> np.ndarray:
    """Of the rows [first, last) as they are: uint64 (rows,), none of them 0."""
    columns = [(name.encode() + b"\0", _row_bytes(file[name], first, last)) for name in covered(file, table)]
    found = np.zeros(last - first, dtype=np.uint64)
    for i in range(last - first):
        total = hashlib.blake2b(digest_size=8)
        total.update((first + i).to_bytes(8, "little"))
        for name, values in columns:
            total.update(name)
            total.update(values[i])
        if table == "start":
            total.update(b"".join(_identity(file, first + i)))
        found[i] = int.from_bytes(total.digest(), "little") or 1
    return found


def has_checksums(file: h5py.File) -> bool:
    """Not before schema 2."""
    return int(file.attrs["schema_version"]) >= 2


def find_damage(file: h5py.File) -> Damage:
    """Compare all checksums that the file has; those of schema 1 have none, and no damage is seen.

    Raises one of h5py's many errors where the file's structure is damaged.
    """
    committed = int(file.attrs["generations_committed"])
    if not has_checksums(file):
        return Damage()
    wrong = _wrong_rows(file, "generation", committed)
    uncounted = _uncounted(file, committed)
    damaged = _named("generation", [row + 1 for row in wrong])
    if uncounted > 1:
        damaged.append(f"the counter, which says {committed}, though {uncounted} more generations are there")
    for table in ALL_TABLES.keys() & file.keys() - {"generation", "member"}:
        columns = covered(file, table)
        if len({len(file[column]) for column in columns}) > 1:
            damaged.append(f"{table}, whose columns differ in length")
            continue
        rows = _wrong_rows(file, table, len(file[table][CHECKSUM]))
        name = "start, settings or attributes:" if table == "start" else f"{table} row"
        damaged += _named(name, rows)
    return Damage(wrong[0] if wrong else math.inf, tuple(damaged), uncounted)


def good_generations(file: h5py.File) -> float:
    """The committed generations before the first damaged one, whatever else is damaged; infinite: all."""
    if not has_checksums(file):
        return math.inf
    wrong = _wrong_rows(file, "generation", int(file.attrs["generations_committed"]))
    return wrong[0] if wrong else math.inf


def _wrong_rows(file: h5py.File, table: str, rows: int) -> list[int]:
    if not rows:
        return []
    return np.flatnonzero(file[table][CHECKSUM][:rows] != checksums(file, table, 0, rows)).tolist()


def _uncounted(file: h5py.File, committed: int) -> int:
    """Whole rows that directly follow the committed ones."""
    stored = file["generation"][CHECKSUM][:]
    row = committed
    while row < len(stored) and stored[row] and stored[row] == checksums(file, "generation", row, row + 1)[0]:
        row += 1
    return row - committed


def _named(name: str, rows: list[int]) -> list[str]:
    more = [f"{len(rows) - NAMED} more"] if len(rows) > NAMED else []
    return [" ".join([name, str(row)]) for row in rows[:NAMED]] + more


def _row_bytes(dataset: h5py.Dataset, first: int, last: int) -> list[bytes]:
    """The values of each row as bytes, little endian; a text's length before it."""
    values = dataset[first:last]
    if values.dtype.kind in "OS":
        return [len(text).to_bytes(8, "little") + text for text in values]
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return [row.tobytes() for row in values]


def _identity(file: h5py.File, start: int) -> Iterator[bytes]:
    """What the file says of itself, and a start's settings."""
    for name in ATTRIBUTES:
        if name in file.attrs:
            yield f"{name}={file.attrs[name]}\0".encode()
    yield file["config"][f"{start:03d}"][()]
