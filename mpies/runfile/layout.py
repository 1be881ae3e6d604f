"""The structure of a run file: its tables, their rows, and the dimensions that these have.

What changes the structure belongs on a copy in memory; see `writer`.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import h5py
import numpy as np

import mpies
from mpies.runfile.checksum import cover, own_columns, seal
from mpies.runfile.schema import (
    ALL_DIMENSIONS,
    ALL_TABLES,
    CHECKSUM,
    MOST_FIGURES,
    PER_GENERATION,
    SCHEMA_VERSION,
    TABLES,
    TEXT,
    Column,
    own_column,
)

# Rows are allocated for all generations at once, or for this many bytes and then twice as many.
ALLOCATION = 4 * 2**20

# Rows of a chunk, which is on the disk as a whole once a row of it is: in tables with a row for each
# generation, no more than there will be, but some, should the run become longer; in those that are hardly
# filled, a few.
MOST_ROWS, LEAST_ROWS, FEW_ROWS = 256, 16, 32
SELDOM = ("start", "evaluation", "metric", "sample")


def lay_out(file: h5py.File, population: int, generations: int, attributes: dict[str, Any]) -> None:
    """The schema's attributes and empty tables, for about so many generations."""
    file.attrs.update(
        schema_version=SCHEMA_VERSION,
        program="mpies",
        program_version=mpies.__version__,
        run_uuid=str(uuid.uuid4()),
        created_utc=utc_now(),
        population=population,
        generations_committed=0,
        **attributes,
    )
    file.create_group("config")
    complete_tables(file, generations=generations)
    # Before there are rows, so that the structure stays at the front, where a truncated file has it.
    name_dimensions(file)


def complete_tables(
    file: h5py.File, tables: dict[str, list[Column]] = TABLES, generations: int = MOST_ROWS
) -> None:
    """Create the tables and columns that are not there: all, or what an earlier version did not have.

    Rows that are there get the fill value, NaN, 0 or an empty text, and a checksum. `generations`: that a new
    run is to have.
    """
    file.attrs.modify("schema_version", SCHEMA_VERSION)
    population, changed = int(file.attrs["population"]), set()
    for table, columns in tables.items():
        width = (population,) if table == "member" else ()
        rows = max((len(dataset) for dataset in file.get(table, {}).values()), default=0)
        for column in columns:
            if f"{table}/{column.name}" not in file:
                _create_dataset(file, f"{table}/{column.name}", column, width, generations)
                file[table][column.name].resize(rows, axis=0)
                changed.add("generation" if table == "member" else table)
    for table in changed:
        cover(file, table)
        seal(file, table, 0, int(file.attrs["generations_committed"]) if table == "generation" else None)


def missing_columns(file: h5py.File, names: Iterable[str]) -> list[str]:
    """Those of a task's figures (generation/cosine_..., member/metric_...) that have no column and get one.

    There are up to MOST_FIGURES of them in a table.
    """
    room = dict.fromkeys(PER_GENERATION, MOST_FIGURES)
    for column in own_columns(file):
        room[column.split("/")[0]] -= 1
    missing = []
    for name in names:
        table = name.split("/")[0]
        if name not in file and room[table] > 0:
            room[table] -= 1
            missing.append(name)
    return missing


def add_own_columns(file: h5py.File, names: list[str]) -> None:
    """Columns for a task's figures that were not measured before, NaN for the generations that are there."""
    population = int(file.attrs["population"])
    for name in names:
        table, _, column = name.partition("/")
        _create_dataset(file, name, own_column(column), (population,) if table == "member" else ())
        file[name].resize(len(file["generation/digest"]), axis=0)
    cover(file, "generation")
    seal(file, "generation", 0, int(file.attrs["generations_committed"]))


def _create_dataset(
    file: h5py.File, name: str, column: Column, width: tuple[int, ...], generations: int = MOST_ROWS
) -> None:
    table = name.partition("/")[0]
    rows = max(1, min(MOST_ROWS, 4096 // (width[0] if width else 1)))
    if table in PER_GENERATION:
        rows = min(rows, max(LEAST_ROWS, generations))
    elif table in SELDOM:
        rows = FEW_ROWS
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


def allocate_rows(file: h5py.File, generations: int) -> None:
    """Make room for more generations, and empty what a killed job left beyond the committed rows."""
    committed = int(file.attrs["generations_committed"])
    row_bytes = sum(d.dtype.itemsize * math.prod(d.shape[1:]) for d in file["member"].values())
    rows = max(2 * committed, ALLOCATION // row_bytes, 1)
    rows = max(committed, min(generations, rows))
    for table in PER_GENERATION:
        for dataset in file[table].values():
            if dataset.maxshape[0] is None:  # one that somebody has added may be fixed
                dataset.resize(rows, axis=0)
                dataset[committed:] = dataset.fillvalue


def add_start(file: h5py.File, settings_yaml: str, row: dict[str, Any]) -> None:
    """Note a start: its settings under the next number, and its row of /start."""
    config, committed = file["config"], int(file.attrs["generations_committed"])
    config[f"{len(config):03d}"] = settings_yaml
    append_row(file, "start", {"generation": committed, "utc": utc_now(), **row})


def append_row(file: h5py.File, table: str, row: dict[str, Any]) -> None:
    """Add a row, a value by column name, to a table that grows with every row."""
    for column in ALL_TABLES[table]:
        dataset = file[table][column.name]
        dataset.resize(dataset.shape[0] + 1, axis=0)
        if column.name == CHECKSUM:
            continue
        value = column.value(row)
        if column.dtype is TEXT:
            # HDF5 strings end at a NUL and hold no half of a surrogate pair.
            value = str(value).replace("\0", "\ufffd").encode(errors="replace").decode()
        dataset[-1] = value
    rows = len(file[table][CHECKSUM])
    seal(file, table, rows - 1, rows)


def append_rows(file: h5py.File, table: str, columns: dict[str, np.ndarray]) -> None:
    """Add many rows at once, values by column name, all of the same length."""
    first = len(file[table][CHECKSUM])
    last = first + len(next(iter(columns.values())))
    for column in ALL_TABLES[table]:
        file[table][column.name].resize(last, axis=0)
        if column.name != CHECKSUM:
            file[table][column.name][first:last] = columns[column.name]
    seal(file, table, first, last)


def evaluated_in(file: h5py.File) -> set[tuple[int, str]]:
    """(generation, split) of the evaluations that are there."""
    table = file["evaluation"]
    return set(zip(table["generation"][:].tolist(), table["split"].asstr()[:], strict=True))


def fill_evaluation(file: h5py.File, row: dict[str, Any]) -> None:
    """Give the evaluation of that generation and split what it lacks of KL and drift."""
    table = file["evaluation"]
    splits = table["split"].asstr()[:] == row["split"]
    for i in np.flatnonzero(splits & (table["generation"][:] == row["generation"])):
        for name in ("kl", "drift_l2"):
            if np.isnan(table[name][i]):
                table[name][i] = row[name]
        seal(file, "evaluation", int(i), int(i) + 1)


def name_dimensions(file: h5py.File) -> None:
    """Bring the dimension scales to their datasets' length, and attach them where they are not.

    This changes the file's structure, so it belongs to the changes that are made on a copy in memory.
    A file of a writer that knew no dimensions gets them, too.
    """
    own = own_columns(file)
    for table in ALL_TABLES.keys() & file.keys():
        of_schema = [f"{table}/{column.name}" for column in ALL_TABLES[table]]
        for dataset in (file[name] for name in [*of_schema, *own] if name.startswith(f"{table}/")):
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
    scale = file.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(128,), dtype="i8")
    scale.attrs["description"] = "row numbers, from 0; names this dimension of other datasets"
    scale.attrs["units"] = "1"
    scale.make_scale(name)


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
