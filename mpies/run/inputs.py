"""A job's settings, with files that are there: looked at before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mpies import config
from mpies.errors import InputError
from mpies.model.folder import refuse_unusable
from mpies.tasks.data import absence


def load_settings(arguments: list[str]) -> config.Settings:
    """The settings of a command line. Raises InputError, also where files are missing on this rank."""
    return require(config.load(arguments))


def require(settings: config.Settings) -> config.Settings:
    """The settings, whose files are there. Raises InputError with a line for each that is missing."""
    problems = [*_missing_files(settings.task)]
    try:
        refuse_unusable(settings.model.path)
    except InputError as error:
        problems.insert(0, str(error))
    if problems:
        raise InputError("\n".join(problems))
    return settings


def _missing_files(task: config.TaskSettings) -> Iterator[str]:
    for key in ("train_data", "eval_data"):
        path = getattr(task, key)
        if path and not Path(path).expanduser().exists():
            yield f"task.{key}: {path}: {absence(path)}"
    for key in ("reward", "expects"):
        for file in dict.fromkeys(name.rpartition(":")[0] for name in task.code_by_setting[key]):
            if file.endswith(".py") and not Path(file).expanduser().is_file():
                yield f"task.{key}: there is no file {file}"
