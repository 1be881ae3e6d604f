"""Code of the user's, FILE.py:NAME or MODULE:NAME: found and loaded, or refused in a line."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mpies.errors import InputError, reason


def load(name: str, setting: str, kind: Callable[[Any], bool] = inspect.isfunction) -> Any:
    """What `name` stands for, which can be called. Raises InputError, which names the setting.

    `kind`: of what else the file has, what could have been meant.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place, setting)
    with _told(place, setting):
        found = getattr(module, attribute, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if kind(value)]
        near = difflib.get_close_matches(attribute, known, n=1) or known[:1]
        hint = f"; did you mean {place}:{near[0]}?" if near else ""
        what = "class" if kind is inspect.isclass else "function"
        raise InputError(f"{setting}: {place} has no {what} {attribute!r}{hint}")
    return found


def refuse_signature(function: Callable[..., Any], setting: str, name: str, like: str) -> None:
    """Raise InputError if it does not take every column of the data; `like`: whose signature it has."""
    wanted = f"{like}: def {name.rpartition(':')[2]}(prompts, completions, **columns)"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some that are built in
        raise InputError(
            f"{setting}: {name} tells no signature; write a function that calls it, {wanted}"
        ) from None
    if inspect.Parameter.VAR_KEYWORD not in [parameter.kind for parameter in parameters]:
        raise InputError(
            f"{setting}: {name} does not take every column; its signature has to end with **columns, {wanted}"
        )


def call(function: Callable[..., Any], **columns: Any) -> Any:
    """What the function returns; TRL takes functions that are `async`, too."""
    made = function(**columns)
    return asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made


async def _awaited(made: Awaitable[Any]) -> Any:
    return await made


def digests(names: list[str]) -> dict[str, str]:
    """SHA-256 of the files with the code, which are loaded, by the names.

    What these files import is not in it.
    """
    files = {name: _file_of(name.rpartition(":")[0]) for name in names}
    return {n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items() if f and f.is_file()}


def place_of(error: BaseException) -> str:
    """Where an error happened: the innermost file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename} line {frames[-1].lineno}" if frames else "no place is known"


def _file_of(place: str) -> Path | None:
    """FILE.py, or the file of a module that can be found; None: it has none."""
    if place.endswith(".py"):
        return Path(place).expanduser()
    file = getattr(sys.modules.get(place), "__file__", None)
    return Path(file) if file else None


def _module(place: str, setting: str) -> ModuleType:
    """The module at FILE.py, beside which it may import others, or of that name."""
    path = Path(place).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"{setting}: there is no file {place}")
    with _told(place, setting):
        return importlib.import_module(place) if path.suffix != ".py" else _from_file(path.resolve())


@contextlib.contextmanager
def _told(place: str, setting: str) -> Iterator[None]:
    """Whatever ends the user's code within, sys.exit included, is bad input; Ctrl-C is not."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{setting}: {place}: no module named {error.name!r}") from None
    except BaseException as error:
        raise InputError(f"{setting}: {place} cannot be imported: {_in_a_line(error)}") from None


def _in_a_line(error: BaseException) -> str:
    """An error of the user's code, with the place where it happened."""
    if isinstance(error, SyntaxError):
        text, where = error.msg, f"{error.filename} line {error.lineno}"
    else:
        text, where = reason(error), place_of(error)
    return f"{type(error).__name__}: {text} ({where})"


def _from_file(path: Path) -> ModuleType:
    name = f"mpies_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:  # by another function of the same file
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader  # a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as dataclasses and pickle expect
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
