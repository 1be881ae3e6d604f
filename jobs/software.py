"""One line for a job's log: the versions of what computes."""

import platform
from importlib.metadata import version

import mpi4py

mpi4py.rc.initialize = False  # in the batch script's shell there is no launcher
from mpi4py import MPI  # noqa: E402

packages = ", ".join(f"{name} {version(name)}" for name in ("mpi4py", "torch", "transformers"))
library = MPI.Get_library_version().splitlines()[0].strip()
print(f"== Python {platform.python_version()}, {packages}; {library}")
