"""mpirun -n N python -m mpies.evaluate; see command.py."""

from __future__ import annotations

import sys

from mpies.evaluate import command
from mpies.ranks import launch

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        if launch.is_first():
            command.parser().print_help()
    else:
        launch.run(command.main, sys.argv[1:])
