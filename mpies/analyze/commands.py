"""The commands: each reads run files, computes, and shows or writes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpies import drawing
from mpies.analyze.parser import make_parser
from mpies.analyze.run import Run, open_run, open_runs, short_names
from mpies.command_line import conduct_alone, tell
from mpies.errors import InputError, reason
from mpies.extras import need
from mpies.text import json_ready

BAD_INPUT = InputError.status


def main(arguments: list[str]) -> int:
    """Run a command. Returns the exit code: 0; 2 for bad input, each file's fault told in a line."""
    return conduct_alone(_command, arguments)


def _command(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    return COMMANDS[options.command](options)


def summary(options: argparse.Namespace) -> int:
    from mpies.analyze import terminal
    from mpies.analyze.summary import summarize

    runs, status = _read(options.runs)
    summaries = [summarize(run, name) for run, name in zip(runs, short_names(runs))]
    if options.json:
        print(json.dumps([json_ready(dataclasses.asdict(s)) for s in summaries], indent=2))
        return status
    screen = terminal.open_console()
    if len(runs) == 1 or options.detail:
        for run, s in zip(runs, summaries):
            screen.print(terminal.render_detail(run, s, screen))
    else:
        screen.print(terminal.render_overview(runs, summaries, screen))
    return status


def plot(options: argparse.Namespace) -> int:
    form = drawing.form_of(options.output)
    if not 1 <= options.dpi <= 1200:
        raise InputError(f"--dpi: given {options.dpi}, allowed is 1 to 1200")
    runs, status = _read(options.runs)
    need("matplotlib", "plot")
    from mpies.analyze import figures

    panels = options.panels.split(",") if options.panels else []
    unknown = [panel for panel in panels if panel not in figures.PANELS]
    if unknown:
        raise InputError(f"--panels: no panel {unknown[0]!r}; there are {', '.join(figures.PANELS)}")
    figure = figures.draw(runs, panels)
    _write(options.output, lambda path: drawing.save(figure, path, form, options.dpi))
    return status


def compare(options: argparse.Namespace) -> int:
    from mpies.analyze import terminal
    from mpies.analyze.compare import compare_runs

    if options.generation is not None and options.generation < 1:
        raise InputError(f"--generation: given {options.generation}, allowed is 1 or more")
    runs, status = _read(options.runs)
    result = compare_runs(runs, options.metric, options.generation)
    terminal.open_console().print(terminal.render_comparison(result))
    return status


def samples(options: argparse.Namespace) -> int:
    from mpies.analyze import answers, terminal

    run = open_run(options.run)
    screen = terminal.open_console()
    if options.list:
        screen.print(terminal.render_prompts(answers.answered_prompts(run)))
        return 0
    split, prompt = answers.choose_prompt(run, options.prompt)
    found = answers.answers_to(run, split, prompt)
    screen.print(terminal.render_answers(split, prompt, found, full=options.full))
    return 0


def export(options: argparse.Namespace) -> int:
    from mpies.analyze.export import export_run

    run = open_run(options.run)
    for path in export_run(run, short_names([run])[0], options.to or options.format, Path(options.output)):
        print(f"wrote {path}")
    return 0


def report(options: argparse.Namespace) -> int:
    from mpies.analyze.report import render_page

    runs, status = _read(options.runs)
    text = render_page(runs)
    _write(options.output, lambda path: path.write_text(text, encoding="utf-8"))
    return status


def watch(options: argparse.Namespace) -> int:
    from mpies.analyze import terminal
    from mpies.analyze.watch import watch_run

    if not (math.isfinite(options.interval) and options.interval > 0):
        raise InputError(f"--interval: given {options.interval:g}, allowed is a number of seconds above 0")
    with contextlib.suppress(KeyboardInterrupt):  # how one leaves it
        watch_run(Path(options.run), terminal.open_console(), options.interval)
    return 0


def _read(paths: list[str]) -> tuple[list[Run], int]:
    """The readable runs and the exit code to end with. Raises InputError if none can be read."""
    runs, problems = open_runs(paths)
    if not runs:
        for problem in problems[:-1]:
            tell(str(problem))
        raise problems[-1]
    for problem in problems:
        tell(str(problem))
    return runs, BAD_INPUT if problems else 0


def _write(output: str, write: Callable[[Path], Any]) -> None:
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise InputError(f"--output: cannot write {path} ({reason(error)})") from None
    print(f"wrote {path}")


COMMANDS = {command.__name__: command for command in (summary, plot, compare, samples, export, report, watch)}
