"""The commands: each reads run files, computes, and shows or writes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpies.analyze.run import Run, names, open_run, open_runs
from mpies.errors import InputError, OrderlyError, reason

PROGRAM = "python -m mpies.analyze"
FORMS = ("png", "svg", "pdf")
BAD_INPUT = InputError.status


def main(arguments: list[str]) -> int:
    """Run a command. Returns the exit code: 0; 2 for bad input, each file's fault told in a line."""
    options = parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
        return status
    except OrderlyError as error:
        _tell(error)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has had enough. What is left must not fail when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def summary(options: argparse.Namespace) -> int:
    from mpies.analyze import terminal
    from mpies.analyze.summary import summarize

    runs, status = _read(options.runs)
    summaries = [summarize(run, name) for run, name in zip(runs, names(runs))]
    if options.json:
        print(json.dumps([_strict(dataclasses.asdict(s)) for s in summaries], indent=2))
        return status
    screen = terminal.console()
    if len(runs) == 1 or options.detail:
        for run, s in zip(runs, summaries):
            screen.print(terminal.detail(run, s, screen))
    else:
        screen.print(terminal.overview(runs, summaries, screen))
    return status


def plot(options: argparse.Namespace) -> int:
    form = _form_of(options.output)
    runs, status = _read(options.runs)
    _extras().need("matplotlib", "plot")
    from mpies.analyze import figures

    panels = options.panels.split(",") if options.panels else []
    unknown = [panel for panel in panels if panel not in figures.PANELS]
    if unknown:
        raise InputError(f"--panels: no panel {unknown[0]!r}; there are {', '.join(figures.PANELS)}")
    figure = figures.draw(runs, panels)
    _write(options.output, lambda path: figures.save(figure, path, form, options.dpi))
    return status


def compare(options: argparse.Namespace) -> int:
    from mpies.analyze import terminal
    from mpies.analyze.compare import compare as compared

    runs, status = _read(options.runs)
    result = compared(runs, options.metric, options.generation)
    terminal.console().print(terminal.comparison(result))
    return status


def samples(options: argparse.Namespace) -> int:
    from mpies.analyze import answers, terminal

    run = open_run(options.run)
    screen = terminal.console()
    if options.list:
        screen.print(terminal.prompts(answers.prompts(run)))
        return 0
    split, prompt = answers.choose(run, options.prompt)
    found = answers.answers(run, split, prompt)
    screen.print(terminal.answers(split, prompt, found, full=options.full))
    return 0


def export(options: argparse.Namespace) -> int:
    from mpies.analyze.export import export as exported

    run = open_run(options.run)
    for path in exported(run, names([run])[0], options.to or options.format, Path(options.output)):
        print(f"wrote {path}")
    return 0


def report(options: argparse.Namespace) -> int:
    from mpies.analyze.report import report as page

    runs, status = _read(options.runs)
    text = page(runs)
    _write(options.output, lambda path: path.write_text(text, encoding="utf-8"))
    return status


def watch(options: argparse.Namespace) -> int:
    from mpies.analyze import terminal
    from mpies.analyze.watch import watch as watched

    if not (math.isfinite(options.interval) and options.interval > 0):
        raise InputError(f"--interval: given {options.interval:g}, allowed is a number of seconds above 0")
    with contextlib.suppress(KeyboardInterrupt):  # how one leaves it
        watched(Path(options.run), terminal.console(), options.interval)
    return 0


def _read(paths: list[str]) -> tuple[list[Run], int]:
    """The readable runs and the exit code to end with. Raises InputError if none can be read."""
    runs, problems = open_runs(paths)
    if not runs:
        for problem in problems[:-1]:
            _tell(problem)
        raise problems[-1]
    for problem in problems:
        _tell(problem)
    return runs, BAD_INPUT if problems else 0


def _tell(error: Exception) -> None:
    print(f"mpies: {error}", file=sys.stderr)


def _form_of(output: str) -> str:
    form = Path(output).suffix.lower().removeprefix(".")
    if form not in FORMS:
        endings = ", ".join(f".{form}" for form in FORMS)
        raise InputError(f"--output: given {output}, allowed is a name that ends in {endings}")
    return form


def _write(output: str, write: Callable[[Path], Any]) -> None:
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise InputError(f"--output: cannot write {path} ({reason(error)})") from None
    print(f"wrote {path}")


def _strict(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _extras():
    from mpies.analyze import extras

    return extras


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Look at run files: while a job writes them or years later, without MPI, torch or GPU.",
        epilog="A RUN is a run.h5 or its folder. `COMMAND --help` shows an example of each.",
    )
    commands = whole.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[[argparse.Namespace], int], about: str, example: str, many: bool):
        sub = commands.add_parser(
            command.__name__,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"example:\n  {PROGRAM} {command.__name__} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        if many:
            sub.add_argument("runs", metavar="RUN", nargs="+", help="run files, or folders with a run.h5")
        else:
            sub.add_argument("run", metavar="RUN", help="a run file, or a folder with a run.h5")
        return sub

    sub = add(summary, "what was run, how far it came, how fast, and what is odd", "runs/*", True)
    sub.add_argument("--detail", action="store_true", help="all of each run, also of several")
    sub.add_argument("--json", action="store_true", help="as JSON, for scripts")

    sub = add(plot, "draw a figure of one run or many", "runs/*/run.h5 --output runs.svg", True)
    sub.add_argument("--output", required=True, metavar="FILE", help="a .png, .svg or .pdf file")
    sub.add_argument("--panels", metavar="A,B", help="only these: learning, answers, time, members, ranks,"
                     " phases, drift, accuracy, kl")  # fmt: skip
    sub.add_argument("--dpi", type=int, default=150, help="pixels per inch of a .png (default 150)")

    sub = add(compare, "compare settings over seeds", "runs/sigma*/run.h5 --generation 200", True)
    sub.add_argument(
        "--metric",
        default="held_out",
        help="held_out: reward at the last held-out evaluation (default); reward: of the members, at the"
        " end; or another column of /evaluation: accuracy, kl, ...",
    )
    sub.add_argument("--generation", type=int, metavar="G", help="as if all had stopped there")

    sub = add(
        samples, "one prompt's answers through the generations", "runs/quickstart --prompt France", False
    )
    sub.add_argument("--prompt", metavar="P", help="its number, or a part of its text; default: the first")
    sub.add_argument("--list", action="store_true", help="list the prompts with their numbers")
    sub.add_argument("--full", action="store_true", help="whole answers, not the first line of each")

    sub = add(
        export, "write the tables for other programs", "runs/quickstart --format csv --output tables/", False
    )
    form = sub.add_mutually_exclusive_group(required=True)
    form.add_argument("--format", choices=["csv", "parquet", "json"], help="files")
    form.add_argument("--to", choices=["tensorboard", "wandb-offline"], help="a folder for that program")
    sub.add_argument("--output", required=True, metavar="PATH", help="a folder; for json, a file")

    sub = add(report, "all of it as one HTML page, to keep or to send", "runs/* --output report.html", True)
    sub.add_argument("--output", required=True, metavar="FILE", help="the page to write")

    sub = add(watch, "a live view of a job that is running, here or elsewhere", "runs/quickstart", False)
    sub.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between looks (default 2)"
    )
    return whole
