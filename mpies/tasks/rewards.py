"""The user's reward functions: found, loaded, weighted.

Their signature is that of TRL's GRPOTrainer; so is what becomes of several: the weighted sum of those
that do not return None for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mpies.errors import InputError, reason
from mpies.tasks.base import Reward, check_rewards


@dataclass(frozen=True)
class Weighted:
    """Several reward functions as one, which logs each one's rewards under its name."""

    functions: dict[str, Reward]
    weights: dict[str, float]

    def __call__(self, **columns: Any) -> list[float]:
        answers = len(columns["completions"])
        made = {
            name: check_rewards(_called(function, columns), answers, name)
            for name, function in self.functions.items()
        }
        if len(made) > 1:
            for name, rewards in made.items():
                columns["log_extra"](_logged_as(name), rewards)
        terms = np.array([self.weights[name] * rewards for name, rewards in made.items()])
        return [_sum([term for term in answer if not math.isnan(term)]) for answer in terms.T.tolist()]


def load(weights: dict[str, float]) -> Weighted:
    """The functions that `task.reward` names, as FILE.py:FUNCTION or MODULE:FUNCTION. Raises InputError."""
    return Weighted({name: _function(name) for name in weights}, weights)


def parts_of(weights: dict[str, float]) -> frozenset[str]:
    """The names of several functions' rewards among an answer's metrics; none of a single function."""
    return frozenset(map(_logged_as, weights)) if len(weights) > 1 else frozenset()


def _logged_as(name: str) -> str:
    return name.rpartition(":")[2]


def digests(weights: dict[str, float]) -> dict[str, str]:
    """SHA-256 of the files with the functions, which are loaded, by the functions' names.

    What these files import is not in it.
    """
    files = {name: _file_of(name.rpartition(":")[0]) for name in weights}
    return {n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items() if f and f.is_file()}


def _file_of(place: str) -> Path | None:
    """FILE.py, or the file of a module that is loaded; None: it has none."""
    if place.endswith(".py"):
        return Path(place).expanduser()
    file = getattr(sys.modules.get(place), "__file__", None)
    return Path(file) if file else None


def _sum(terms: list[float]) -> float:
    return math.fsum(terms) if terms else math.nan


def _called(function: Reward, columns: dict[str, Any]) -> Any:
    """What the function returns; TRL takes functions that are `async`, too."""
    made = function(**columns)
    return asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made


async def _awaited(made: Awaitable[Any]) -> Any:
    return await made


def _function(name: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    module = _module(place)
    with _users_code(place):
        function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(attribute, known, n=1) or known[:1]
        hint = f"; did you mean {place}:{near[0]}?" if near else ""
        raise InputError(f"task.reward: {place} has no function {attribute!r}{hint}")
    _refuse_signature(function, name, attribute)
    return function


def _refuse_signature(function: Callable[..., Any], name: str, attribute: str) -> None:
    wanted = f"as in TRL: def {attribute}(prompts, completions, **columns)"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some that are built in
        raise InputError(
            f"task.reward: {name} tells no signature; write a function that calls it, {wanted}"
        ) from None
    if inspect.Parameter.VAR_KEYWORD not in [parameter.kind for parameter in parameters]:
        raise InputError(
            f"task.reward: {name} does not take every column; its signature has to end with **columns,"
            f" {wanted}"
        )


def _module(place: str) -> ModuleType:
    """The module at FILE.py, beside which it may import others, or of that name."""
    path = Path(place).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"task.reward: there is no file {place}")
    with _users_code(place):
        return importlib.import_module(place) if path.suffix != ".py" else _from_file(path.resolve())


@contextlib.contextmanager
def _users_code(place: str) -> Iterator[None]:
    """Whatever ends the user's code within, sys.exit included, is bad input; Ctrl-C is not."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"task.reward: {place}: no module named {error.name!r}") from None
    except BaseException as error:
        raise InputError(f"task.reward: {place} cannot be imported: {_told(error)}") from None


def _told(error: BaseException) -> str:
    """An error of the user's code in one line, with the place where it happened."""
    if isinstance(error, SyntaxError):
        text, file, line = error.msg, error.filename, error.lineno
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text, file, line = reason(error), last.filename, last.lineno
    return f"{type(error).__name__}: {text} ({file} line {line})"


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
