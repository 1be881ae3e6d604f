"""mpirun -n N python -m mpies.probe; see command.py."""

from __future__ import annotations

import mpies.probe
from mpies import config
from mpies.command_line import fill
from mpies.probe import command
from mpies.ranks import launch


def show_help() -> None:
    print(f"{fill(mpies.probe.__doc__ or '')}\n\n{config.describe()}")


if __name__ == "__main__":
    launch.start("probe", command.main, show_help)
