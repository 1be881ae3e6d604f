"""Python as if some modules were not there: other systems, and environments without extras."""

from __future__ import annotations

import sys

# What macOS and Windows lack, or one of them.
FOREIGN = ("fcntl", "resource", "pwd", "grp", "termios")
PYTHON = """
import os, runpy, sys

{before}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {absent!r}:
    sys.modules.pop(name, None)
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def python_without(*absent: str, before: str = "") -> list[str]:
    """The start of a command, MODULE ARGUMENTS to follow: Python, as if these modules were not installed."""
    return [sys.executable, "-c", PYTHON.format(absent=absent, before=before)]


def python_on_another_system() -> list[str]:
    """The same, with what only POSIX has, and without MPI."""
    # Libraries that look for the system and find this one get what they need of it.
    before = "import filelock, psutil\ndel os.sched_getaffinity"
    return python_without(*FOREIGN, "mpi4py", before=before)
