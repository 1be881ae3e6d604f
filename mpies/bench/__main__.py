"""The command line of the bench."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mpies import bench
from mpies.command_line import EXIT_CODES, HelpFormatter, Parser
from mpies.errors import InputError
from mpies.ranks import launch
from mpies.ranks.agreement import together

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

PARTS = ("kernels", "vllm", "vllm-lowrank", "generation", "one-turn", "share", "memory", "scaling")
MOST = {
    **dict.fromkeys(("repeats", "population", "prompts", "tokens"), 10**6),
    "threads": 4096,
    "members": 10**7,
    "size": 2**40,
}
PATIENCE = float("inf")  # a part of one rank, which the others wait for, takes as long as its model needs


def parser() -> argparse.ArgumentParser:
    description, _, epilog = bench.__doc__.partition("\n\n")
    made = Parser(
        prog="python -m mpies.bench",
        description=description,
        epilog=f"{epilog}\n{EXIT_CODES}",
        formatter_class=HelpFormatter,
    )
    made.add_argument("--model", default="quickstart", help="a model folder (%(default)s)")
    made.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    made.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    made.add_argument("--repeats", type=int, default=3, help="runs that a median is of (%(default)s)")
    made.add_argument("--members", type=int, default=32, help="of a generation (%(default)s)")
    made.add_argument("--prompts", type=int, default=2, help="per member (%(default)s)")
    made.add_argument("--tokens", type=int, default=48, help="per answer (%(default)s)")
    made.add_argument("--size", type=int, default=2**25, help="parameters of the kernels' tensor")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    made.add_argument("--forecast", action="store_true", help="only a generation, and on 8 to 4096 ranks")
    made.add_argument("--population", type=int, default=1024, help="members of the forecast (%(default)s)")
    made.add_argument("--json", type=Path, help="write the figures here, too")
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError for what cannot be."""
    given = parser().parse_args(arguments)
    if given.forecast:
        given.only = ["generation"]
    for name, most in MOST.items():
        if not 1 <= getattr(given, name) <= most:
            raise InputError(f"--{name}: given {getattr(given, name)}, allowed is 1 to {most}")
    if given.json and (given.json.is_dir() or not given.json.absolute().parent.is_dir()):
        raise InputError(f"--json: cannot write {given.json}; name a file in a folder that is there")
    return given


def main(comm: Comm, arguments: list[str]) -> int:
    given = together(comm, parse, arguments)
    # torch comes along: only once the command line is good.
    from rich.console import Console

    from mpies.bench.measuring import describe, measure, prepare, show
    from mpies.ranks.collectives import set_timeout

    set_timeout(comm, PATIENCE)
    device, dtype = prepare(comm, given)
    with Console(stderr=True, quiet=comm.rank != 0).status("...") as status:
        figures = list(measure(comm, given, device, dtype, lambda text: status.update(text)))
    if comm.rank == 0:
        facts = describe(comm, given, device, dtype)
        show(facts, figures)
        if given.json:
            rows = [{**asdict(figure), "verdict": figure.verdict} for figure in figures]
            given.json.write_text(json.dumps({"facts": facts, "figures": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    launch.start("bench", main, lambda: parser().print_help())
