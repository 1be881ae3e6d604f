"""Paths of settings, absolute from the start.

A job's own code, or its user's, may change its folder, and its run file is read from other folders later:
a relative path would then mean another file.
"""

from __future__ import annotations

import os
from typing import Any

from mpies.config.settings import Settings
from mpies.config.task_settings import names_file


def make_absolute(settings: Settings) -> Settings:
    """With all paths absolute, by the folder that the process is in now."""
    changes: dict[str, dict[str, Any]] = {
        "model": {"path": _of_model(settings.model.path)},
        "task": {
            "train_data": _absolute(settings.task.train_data),
            "eval_data": _absolute(settings.task.eval_data),
            "expects": _of_code(settings.task.expects),
            "environment": _of_code(settings.task.environment),
            "environment_factory": _of_factories(settings.task.environment_factory),
            "agent": _of_code(settings.task.agent),
            "tools": [_of_code(name) for name in settings.task.tools],
            "reward": {_of_code(name): weight for name, weight in settings.task.reward.items()},
        },
        "run": {
            "directory": _absolute(settings.run.directory),
            "metrics": _absolute(settings.run.metrics),
        },
    }
    sections = {name: getattr(settings, name).model_copy(update=change) for name, change in changes.items()}
    return settings.model_copy(update=sections)


def relative_paths(settings: Settings) -> dict[str, str]:
    """Files that the task would read and run which have relative paths, by their settings' full keys.

    Versions before 0.2.0 wrote them into run files as they were given.
    """
    task = settings.task
    files = {
        "task.train_data": [task.train_data],
        "task.eval_data": [task.eval_data],
        **{f"task.{key}": list(filter(names_file, names)) for key, names in task.code_by_setting.items()},
    }
    return {
        key: path
        for key, paths in files.items()
        for path in reversed(paths)
        if path and not os.path.isabs(path)
    }


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path else path


def _of_model(path: str) -> str:
    """A hub id looks like a relative path: a folder is what is there."""
    return _absolute(path) if os.path.isdir(os.path.expanduser(path)) else path


def _of_code(name: str) -> str:
    place, _, function = name.rpartition(":")
    return f"{_absolute(place)}:{function}" if names_file(name) else name


def _of_factories(given: str | dict[str, str]) -> str | dict[str, str]:
    if isinstance(given, str):
        return _of_code(given)
    return {name: _of_code(place) for name, place in given.items()}
