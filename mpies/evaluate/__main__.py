"""mpirun -n N python -m mpies.evaluate; see command.py."""

from __future__ import annotations

import sys

from mpies import parallel
from mpies.evaluate import command

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        command.parser().print_help()
    else:
        parallel.run(command.main, sys.argv[1:])
