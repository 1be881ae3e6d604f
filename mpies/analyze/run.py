"""A run file in memory: its committed rows as NumPy arrays and pandas frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from mpies.errors import InputError
from mpies.plain_yaml import given, parse
from mpies.runfile import ALL_TABLES, COMMAND_TABLES, RUN_FILE, path_of
from mpies.runfile.checksum import find_damage
from mpies.runfile.reader import damage_told, open_for_reading
from mpies.runfile.schema import CHECKSUM

if TYPE_CHECKING:
    import pandas

# Tables that files of earlier versions may lack, and those that only `mpies.evaluate --log` makes.
OPTIONAL = ("metric", "prompt", *COMMAND_TABLES)


@dataclass(frozen=True)
class Run:
    """The committed part of a run file, as it was when it was read.

    `tables` has a dictionary per table of the file, column name -> array: (G,) in "generation", (G, N)
    in "member", a row per evaluation, figure, kept answer and start in the others. Columns that the file
    does not have are not there; `column` gives NaN for them.
    """

    path: Path
    attributes: dict[str, Any]
    """The file's root attributes as Python numbers and texts."""
    configs: list[str] = field(repr=False)
    """The resolved settings as YAML, one entry per start."""
    settings: dict[str, dict[str, Any]] = field(repr=False)
    """The settings of the latest start, section -> key -> value."""
    tables: dict[str, dict[str, np.ndarray]] = field(repr=False)
    written: float
    """When the file was last written to, in seconds since the epoch."""
    damage: str = ""
    """What of the file is not as it was written."""

    @property
    def committed(self) -> int:
        """G, the number of committed generations."""
        return self.attributes["generations_committed"]

    @property
    def population(self) -> int:
        """N, the number of members of a generation."""
        return self.attributes["population"]

    @property
    def target(self) -> int:
        """The number of generations that the run was last asked for."""
        return int(self.settings.get("es", {}).get("generations", self.committed))

    def column(self, name: str) -> np.ndarray:
        """A column by its path in the file, "generation/tokens"; NaN where the file has none.

        (G,), (G, N) or (rows,), by its table.
        """
        table, _, key = name.partition("/")
        columns = self.tables[table]
        if key in columns:
            return columns[key]
        return np.full(next(iter(columns.values())).shape, np.nan)

    @cached_property
    def generations(self) -> pandas.DataFrame:
        """A row per generation, by its number from 0.

        Row g tells of the members around the weights after g updates, and of the step to g + 1.
        """
        return self._frame("generation", index="generation")

    @cached_property
    def members(self) -> pandas.DataFrame:
        """A row per member, by (generation, member)."""
        import pandas as pd

        shape = (self.committed, self.population)
        index = pd.MultiIndex.from_product(map(range, shape), names=["generation", "member"])
        columns = {name: values.ravel() for name, values in self.tables["member"].items()}
        return self._named(pd.DataFrame(columns, index=index))

    @cached_property
    def evaluations(self) -> pandas.DataFrame:
        """A row per evaluation of unperturbed weights; `generation` counts their updates."""
        return self._frame("evaluation")

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """A row per evaluation, split and further figure of the task."""
        return self._frame("metric")

    @cached_property
    def samples(self) -> pandas.DataFrame:
        """A row per kept answer; `generation` counts the updates in the weights that answered."""
        return self._frame("sample")

    @cached_property
    def prompts(self) -> pandas.DataFrame:
        """A row per evaluation and prompt."""
        return self._frame("prompt")

    @cached_property
    def figures(self) -> pandas.DataFrame:
        """A row per figure that `mpies.evaluate --log` measured."""
        return self._frame("figure")

    @cached_property
    def answers(self) -> pandas.DataFrame:
        """A row per answer that it kept; see `samples` for training's own."""
        return self._frame("answer")

    @cached_property
    def starts(self) -> pandas.DataFrame:
        """A row per start of the job."""
        return self._frame("start")

    def evaluated(self, split: str, column: str = "reward_mean") -> tuple[np.ndarray, np.ndarray]:
        """(generations, values) of a split's evaluations in which the column was measured, in order."""
        table = self.tables["evaluation"]
        values = self.column(f"evaluation/{column}")
        if values.dtype.kind not in "fiu":
            return np.zeros(0, dtype=int), np.zeros(0)
        kept = np.flatnonzero((table["split"] == split) & np.isfinite(values))
        kept = kept[np.argsort(table["generation"][kept], kind="stable")]
        return table["generation"][kept], values[kept]

    def _frame(self, table: str, index: str | None = None) -> pandas.DataFrame:
        import pandas as pd

        frame = pd.DataFrame(self.tables[table])
        if index:
            frame.index.name = index
        return self._named(frame)

    def _named(self, frame: pandas.DataFrame) -> pandas.DataFrame:
        """With the run's attributes, which pandas keeps and writes to Parquet."""
        frame.attrs = {"run_file": str(self.path), **self.attributes}
        return frame


def open_run(path: Path | str) -> Run:
    """Read a run file, or the one in a run directory; also while a job writes it.

    Raises InputError, in one line, if there is none, or it is damaged, foreign or of a newer schema.
    """
    path = path_of(path)
    with open_for_reading(path) as file, damage_told(path):
        attributes = {name: _python(value) for name, value in file.attrs.items()}
        configs = [file["config"][name].asstr()[()] for name in sorted(file["config"])]
        return Run(
            path=path,
            attributes=attributes,
            configs=configs,
            settings=_settings(configs[-1]),
            tables=_tables(file, attributes["generations_committed"], attributes["population"]),
            written=path.stat().st_mtime,
            damage=str(find_damage(file)),
        )


def open_runs(paths: Iterable[Path | str]) -> tuple[list[Run], list[InputError]]:
    """The runs that can be read, and what is wrong with the others. A run given twice counts once."""
    runs: dict[Path, Run] = {}
    problems = []
    for path in paths:
        try:
            run = open_run(path)
            runs.setdefault(run.path.resolve(), run)
        except InputError as error:
            problems.append(error)
    return list(runs.values()), problems


def short_names(runs: list[Run]) -> list[str]:
    """Short names that tell the runs apart: as many of the last parts of their paths as it takes."""
    parts = [_parts(run.path) for run in runs]
    depth = [1] * len(runs)
    while True:
        shown = ["/".join(p[-d:]) for p, d in zip(parts, depth)]
        again = [i for i in range(len(runs)) if shown.count(shown[i]) > 1 and depth[i] < len(parts[i])]
        if not again:
            return shown
        for i in again:
            depth[i] += 1


def _parts(path: Path) -> tuple[str, ...]:
    """The parts of a path that can name a run: run.h5 is what all are called."""
    path = path.resolve()
    return path.parent.parts if path.name == RUN_FILE else path.with_suffix("").parts


def _tables(file: h5py.File, committed: int, population: int) -> dict[str, dict[str, np.ndarray]]:
    tables = {table: _columns(file, table) for table in ALL_TABLES}
    shapes = {"generation": (committed,), "member": (committed, population)}
    for table, columns in tables.items():
        if table in shapes:
            cut = {name: values[:committed] for name, values in columns.items()}
            tables[table] = {name: values for name, values in cut.items() if values.shape == shapes[table]}
            # A user's own column need not be as long as the run has become; the program's have to.
            odd = [c.name for c in ALL_TABLES[table] if c.name in cut.keys() - tables[table].keys()]
            if odd:
                raise ValueError(f"/{table}/{odd[0]} is not of shape {shapes[table]}")
        elif table == "start":
            if not len(columns["generation"]):
                raise ValueError("/start has no row")
        else:
            kept = columns["generation"] <= committed
            tables[table] = {name: values[kept] for name, values in columns.items()}
    return tables


def _columns(file: h5py.File, name: str) -> dict[str, np.ndarray]:
    """All columns that the file has but checksums, those of the schema first, in its order."""
    schema = [column.name for column in ALL_TABLES[name]]
    if name in OPTIONAL and name not in file:
        return {column: np.zeros(0) for column in schema}
    table = file[name]
    known = [column for column in schema if column in table]
    own = [
        column for column in table if column not in (*schema, CHECKSUM) and _is_column(table, column, known)
    ]
    return {c: _array(table[c]) for c in [*known, *own] if c != CHECKSUM}


def _is_column(table: h5py.Group, name: str, known: list[str]) -> bool:
    """Is what somebody has put into a table a column of it? Of generations, it need not be as long."""
    dataset = table[name]
    if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
        return False
    return table.name in ("/generation", "/member") or dataset.shape[0] == len(table[known[0]])


def _array(dataset: h5py.Dataset) -> np.ndarray:
    text = h5py.check_string_dtype(dataset.dtype)
    return dataset.asstr(errors="replace")[:] if text else dataset[:]


def _settings(text: str) -> dict[str, dict[str, Any]]:
    """Settings as they were written, also by another version: nothing is checked but their form."""
    try:
        settings = parse(text)
    except InputError as error:
        raise ValueError(f"its settings: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError("its settings are not sections")
    sections = {name: section for name, section in settings.items() if isinstance(section, dict)}
    generations = sections.get("es", {}).get("generations", 0)
    if not isinstance(generations, int):
        raise ValueError(f"its es.generations is {given(generations)}, no whole number")
    return sections


def _python(value: Any) -> Any:
    """Attributes as what JSON, YAML and people know."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value
