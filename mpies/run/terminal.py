"""The terminal that shows a rank's output, directly or through a launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")
# What starts ranks on other nodes; the launcher's terminal cannot be seen from there.
DAEMONS = ("prted", "orted")


def width_behind() -> int | None:
    """The width, in characters, of the terminal that shows our output; None without one.

    The launcher is asked first: Open MPI gives every rank a terminal of its own, whatever mpirun's
    output goes to.
    """
    pid = os.getppid()
    while pid > 1:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if name in LAUNCHERS:
                terminal = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY | os.O_NOCTTY)
                try:
                    return os.get_terminal_size(terminal).columns if os.isatty(terminal) else None
                finally:
                    os.close(terminal)
        except (OSError, ValueError):
            return None
        if name in DAEMONS:
            return None
        pid = parent
    return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else None
