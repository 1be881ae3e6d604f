"""mpirun -n N python -m mpies.evaluate; see command.py."""

from __future__ import annotations

from mpies.evaluate import command
from mpies.ranks import launch

if __name__ == "__main__":
    launch.start("evaluate", command.main, lambda: command.parser().print_help())
