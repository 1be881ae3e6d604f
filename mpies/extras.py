"""The package's extras: libraries that only some commands need, and how to install those that are missing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from mpies.errors import InputError

REPLAY = ("torch", "transformers", "numba", "safetensors")
# What the extras of these names in pyproject.toml bring.
MODULES = {"replay": REPLAY, "train": ("mpi4py", *REPLAY)}


def need(module: str, what: str, package: str = "'mpies[analyze]'") -> ModuleType:
    """Import a module. Raises InputError, which says how to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise InputError(f"{what} needs {missing}, which is not here: pip install {package}") from None


def require(extra: str, what: str) -> None:
    """Raise InputError, which names the extra to install, where a library of it is missing. Imports none."""
    missing = [module for module in MODULES[extra] if not _is_there(module)]
    if missing:
        some = ", ".join(missing)
        raise InputError(
            f"{what} needs {some}, which {'is' if len(missing) == 1 else 'are'} not here:"
            f" pip install 'mpies[{extra}]'"
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
