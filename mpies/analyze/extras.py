"""Libraries that only some commands need."""

from __future__ import annotations

import importlib
from types import ModuleType

from mpies.errors import InputError


def need(module: str, what: str, package: str = "'mpies[analyze]'") -> ModuleType:
    """Import a module. Raises InputError, which says how to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise InputError(f"{what} needs {missing}, which is not here: pip install {package}") from None
