"""The command line's options."""

from __future__ import annotations

import argparse

from mpies.command_line import EXIT_CODES, HelpFormatter, Parser
from mpies.splits import HELD_OUT

PROGRAM = "python -m mpies.analyze"
RUNS = {"dest": "runs", "metavar": "RUN", "nargs": "+", "help": "run files, or folders with a run.h5"}
RUN = {"dest": "run", "metavar": "RUN", "help": "a run file, or a folder with a run.h5"}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; their name is in `command`."""
    whole = Parser(
        prog=PROGRAM,
        description="Look at run files: while a job writes them or years later, without MPI, torch or GPU.",
        epilog=f"A RUN is a run.h5 or its folder. `COMMAND --help` shows an example of each.\n\n{EXIT_CODES}",
        formatter_class=HelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for fill in (_summary, _plot, _compare, _samples, _export, _report, _watch):
        fill(commands)
    return whole


def _add(commands, name: str, about: str, example: str, operand: dict) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n  {PROGRAM} {name} {example}",
        formatter_class=HelpFormatter,
    )
    command.add_argument(**operand)
    return command


def _summary(commands) -> None:
    about = "what was run, how far it came, how fast, and what is odd"
    command = _add(commands, "summary", about, "runs/*", RUNS)
    command.add_argument("--detail", action="store_true", help="all of each run, also of several")
    command.add_argument("--json", action="store_true", help="as JSON, for scripts")


def _plot(commands) -> None:
    about = "draw a figure of one run or many"
    command = _add(commands, "plot", about, "runs/*/run.h5 --output runs.svg", RUNS)
    command.add_argument("--output", required=True, metavar="FILE", help="a .png, .svg or .pdf file")
    panels = "learning, answers, time, members, ranks, phases, drift, accuracy, signal, shares, changes, kl"
    command.add_argument("--panels", metavar="A,B", help=f"only these: {panels}")
    command.add_argument("--dpi", type=int, default=150, help="pixels per inch of a .png (default 150)")


def _compare(commands) -> None:
    about = "compare settings over seeds"
    command = _add(commands, "compare", about, "runs/sigma*/run.h5 --generation 200", RUNS)
    command.add_argument(
        "--metric",
        default=HELD_OUT,
        help="held_out: reward at the last held-out evaluation (default); reward: of the members, at the"
        " end; or another column of /evaluation: accuracy, kl, ...",
    )
    command.add_argument("--generation", type=int, metavar="G", help="as if all had stopped there")


def _samples(commands) -> None:
    about = "one prompt's answers through the generations"
    command = _add(commands, "samples", about, "runs/quickstart --prompt France", RUN)
    prompt = "its number, or a part of its text; default: the first"
    command.add_argument("--prompt", metavar="P", help=prompt)
    command.add_argument("--list", action="store_true", help="list the prompts with their numbers")
    command.add_argument("--full", action="store_true", help="whole answers, not the first line of each")


def _export(commands) -> None:
    about = "write the tables for other programs"
    command = _add(commands, "export", about, "runs/quickstart --format csv --output tables/", RUN)
    form = command.add_mutually_exclusive_group(required=True)
    form.add_argument("--format", choices=["csv", "parquet", "json"], help="files")
    form.add_argument("--to", choices=["tensorboard", "wandb-offline"], help="a folder for that program")
    command.add_argument("--output", required=True, metavar="PATH", help="a folder; for json, a file")


def _report(commands) -> None:
    about = "all of it as one HTML page, to keep or to send"
    command = _add(commands, "report", about, "runs/* --output report.html", RUNS)
    command.add_argument("--output", required=True, metavar="FILE", help="the page to write")


def _watch(commands) -> None:
    about = "a live view of a job that is running, here or elsewhere"
    command = _add(commands, "watch", about, "runs/quickstart", RUN)
    seconds = "seconds between looks (default 2)"
    command.add_argument("--interval", type=float, default=2.0, metavar="S", help=seconds)
