"""How numba compiles our kernels, and where it keeps them: to be imported before the first one is made.

numba keeps compiled code beside the sources or in the user's cache. Where neither can be written to (a
container, a site's installation, no home on the compute nodes), it goes to a temporary folder of the
user's own; numba would refuse to start.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import njit

configuration: Any = numba.config  # which gets its attributes from the environment


def use_whole_vectors() -> None:
    """LLVM prefers half of the vector width on many processors with AVX-512; our kernels gain from it all."""
    if llvm.get_host_cpu_features().get("avx512f") and not configuration.CPU_FEATURES:
        configuration.CPU_FEATURES = llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"


def find_a_place_for_compiled_code() -> None:
    """The places that numba looks at, or a folder that is the user's alone: code is loaded from it."""
    try:
        njit(cache=True)(_anything)
    except RuntimeError:  # cannot cache: no locator available
        configuration.CACHE_DIR = str(_private_folder(Path(tempfile.gettempdir())))


def _anything() -> None:
    """A function of this package's folder."""


def _private_folder(parent: Path) -> Path:
    """The same for all of a user's processes, unless somebody else has made it first."""
    folder = parent / f"mpies-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="mpies-numba-", dir=parent))


use_whole_vectors()
find_a_place_for_compiled_code()
