"""Rows from data files: JSON, JSON Lines, parquet, or a folder written by `datasets.save_to_disk`.

What is wrong with them is told in one line: the setting, the file, the line, what is missing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mpies import config
from mpies.errors import InputError, reason
from mpies.tasks.base import Row

KINDS = "a .json, .jsonl or .parquet file, or a folder written by datasets.save_to_disk"

# NAME or ORGANISATION/NAME, without the end of a file's name.
HUB_ID = re.compile(r"[\w-]+(/[\w.-]+)?(?<!\.json)(?<!\.jsonl)(?<!\.parquet)")

DEEPEST = 50  # lists and objects within one another in a row

Placed = Iterator[tuple[str, Any]]
"""(where it is in the file: "line 3", what is there)"""

Check = Callable[..., Row]
"""check(row), or check(row, folder=...) with the folder that paths in the row are relative to."""

Review = Callable[[list[Row]], tuple[int, str] | None]
"""What can only be said of all checked rows at once: the index of a bad one, and what is wrong with it."""


def read_splits(
    settings: config.TaskSettings, check: Check, review: Review | None = None
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows from the files that are set.

    Without a file of their own, `task.eval_size` held-out rows are those that follow the
    `task.train_size` training rows.
    """
    size, held_out = settings.train_size, settings.eval_size
    wanted = size and size + (0 if settings.eval_data else held_out)
    rows = read_rows(settings.train_data, "task.train_data", check, wanted, review)
    if not settings.eval_data:
        return split(rows, size, held_out, settings.train_data)
    train = first("task.train_size", rows, size, settings.train_data)
    rows = read_rows(settings.eval_data, "task.eval_data", check, held_out, review)
    return train, first("task.eval_size", rows, held_out, settings.eval_data)


def split(rows: list[Row], size: int, held_out: int, source: str) -> tuple[list[Row], list[Row]]:
    """The first `size` rows, or all, and the `held_out` that follow. Raises InputError if there are fewer."""
    train = first("task.train_size", rows, size, source)
    if held_out and not size:
        raise InputError(
            f"task.eval_size: given {held_out}, but without task.train_size all rows of {source} are for"
            " training; set it, or task.eval_data"
        )
    rest = f"{source}, behind the {len(train)} for training,"
    return train, first("task.eval_size", rows[len(train) :], held_out, rest) if size else []


def first(setting: str, rows: list[Row], size: int, source: str) -> list[Row]:
    """The first `size` rows; 0: all. Raises InputError if there are fewer."""
    if size > len(rows):
        raise InputError(f"{setting}: given {size}, but {source} has {len(rows)} rows")
    return rows[:size] if size else rows


def first_of_each(
    settings: config.TaskSettings, train: list[Row], held_out: list[Row]
) -> tuple[list[Row], list[Row]]:
    """Of a task's own rows: as many as are set. Raises InputError if there are fewer."""
    return (
        first(
            "task.train_size", train, settings.train_size, f"task {settings.name}, without task.train_data,"
        ),
        first(
            "task.eval_size", held_out, settings.eval_size, f"task {settings.name}, without task.eval_data,"
        ),
    )


def read_rows(
    path: str,
    setting: str,
    check: Check,
    wanted: int = 0,
    review: Review | None = None,
) -> list[Row]:
    """The first `wanted` rows of a data file, or all, each passed through `check`, then all to `review`.

    `check` raises InputError for a bad one.

    All get the same columns: where one is missing, it is None. Raises InputError.
    """
    source = Path(path).expanduser()
    if "folder" in inspect.signature(check).parameters:
        check = partial(check, folder=(source if source.is_dir() else source.parent).absolute())
    try:
        given = islice(_read(source), wanted or None)
        placed = [(place, _check_row(check, place, row)) for place, row in given]
        found = [row for _, row in placed]
        if not found:
            raise InputError("it has no rows")
        if review and (bad := review(found)):
            raise InputError(f"{placed[bad[0]][0]}: {bad[1]}")
    except InputError as error:
        raise InputError(f"{setting}: {path}: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{setting}: {path}: cannot be read ({reason(error)})") from None
    columns = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key) for key in columns} for row in found]


def _check_row(check: Check, place: str, given: Any) -> Row:
    try:
        if not isinstance(given, dict):
            raise InputError(f'given {given!r:.40}, needed is an object such as {{"prompt": "..."}}')
        _refuse_depth(given)
        return check(given)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _refuse_depth(row: Row) -> None:
    """Rows are copied for every call of the reward function, level by level."""
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = [item for held in level for item in (held.values() if isinstance(held, dict) else held)]
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
    raise InputError(f"brackets within brackets, deeper than {DEEPEST}; flatten the row, or leave it out")


def _read(path: Path) -> Placed:
    if not path.exists():
        raise InputError(absence(path))
    if path.is_dir():
        return _saved_dataset(path)
    if not path.is_file():
        raise InputError(f"this is a pipe or a device; needed is {KINDS}")
    readers = {".jsonl": _json, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise InputError(f"cannot tell its kind; needed is {KINDS}")
    return readers[path.suffix](path)


def absence(path: str | Path) -> str:
    """What is said of a path where nothing is."""
    words = f"there is no such file or folder; needed is {KINDS}"
    if not HUB_ID.fullmatch(str(path)):
        return words
    return (
        f"{words}; if it is a data set of a hub, download it first:"
        f" datasets.load_dataset('{path}', split='train').save_to_disk(FOLDER)"
    )


def _json(path: Path) -> Placed:
    """A list of objects, or an object per line. Both are told apart by the first character."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})") from None
    return _array(text) if text.lstrip().startswith("[") else _lines(text)


def _lines(text: str) -> Placed:
    # Not splitlines(), for which a line also ends at characters that JSON texts may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON ({_why(error)})") from None


def _array(text: str) -> Placed:
    """The items of a JSON list with the lines that they begin on."""
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    position = skip(position)
    while position < len(text) and text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            item, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {line} is not JSON ({_why(error)})") from None
        yield f"line {line}", item
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            break
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        raise InputError(f"line {line} is not JSON (a list of objects ends wrongly)")


def _why(error: Exception) -> str:
    return getattr(error, "msg", None) or reason(error)


def _parquet(path: Path) -> Placed:
    parquet = _optional("pyarrow.parquet", f"reading {path.name}", "pyarrow")
    return _numbered(parquet.read_table(path).to_pylist())


def _saved_dataset(path: Path) -> Placed:
    datasets = _optional("datasets", f"reading the folder {path.name}", "datasets")
    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise InputError(f"this folder was not written by datasets.save_to_disk; needed is {KINDS}") from None
    if isinstance(dataset, dict):
        names = ", ".join(dataset)
        raise InputError(f"it holds the splits {names}; name one of them: {path / next(iter(dataset))}")
    # Images are decoded where a model reads them, by the one library that is always the same.
    images = [name for name, kind in dataset.features.items() if _holds_images(kind, datasets)]
    for name in images:
        dataset = dataset.cast_column(name, _undecoded(dataset.features[name], datasets))
    return _numbered(dataset.to_list())


def _holds_images(kind: Any, datasets: Any) -> bool:
    return isinstance(getattr(kind, "feature", kind), datasets.Image)


def _undecoded(kind: Any, datasets: Any) -> Any:
    image = datasets.Image(decode=False)
    return type(kind)(image) if hasattr(kind, "feature") else image


def _numbered(found: list[Row]) -> Placed:
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def _optional(module: str, purpose: str, package: str) -> Any:
    """A library that is needed for some kinds of data only."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{purpose} needs {package}: pip install {package}") from None
