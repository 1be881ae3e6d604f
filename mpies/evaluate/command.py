"""Evaluate a run's weights or a model on a task, on all ranks.

    mpirun -n 8 python -m mpies.evaluate runs/countdown/run.h5 --generation best --samples 16 --kl
    mpirun -n 8 python -m mpies.evaluate Qwen/Qwen2.5-3B-Instruct configs/countdown-qwen2.5-3b.yaml
    python -m mpies.evaluate runs/quickstart --split held_out --json held-out.json --log

A run brings its settings along; a model is evaluated with those of the configuration file, or of the
quickstart. Answers are greedy unless --samples or --temperature is given. They do not depend on the
number of ranks. It runs under mpirun and srun, and without a launcher on one rank.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mpies import config
from mpies.errors import InputError
from mpies.ranks import collectives
from mpies.run.replaying import which_generation
from mpies.runfile import History, RunFile, read_history

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, or one generation of a run."""

    settings: config.Settings
    path: Path | None = None
    """The run file."""
    history: History | None = None
    """Up to the generation."""

    @property
    def generation(self) -> int | None:
        return self.history.generations if self.history else None


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help shows what there is")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="mpirun -n N python -m mpies.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "subject", metavar="RUN|MODEL", help="run.h5 or its folder; or a model folder or hub id"
    )
    made.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG.yaml|section.key=value",
        help="of a model; of a run, values only",
    )
    made.add_argument(
        "--generation", metavar="G", help="of a run: a number, best (held out), or last (default)"
    )
    made.add_argument("--split", choices=["train", "held_out", "all"], default="all", help="default: all")
    made.add_argument(
        "--samples", type=int, metavar="K", help="sample K answers to each prompt; gives pass@k"
    )
    made.add_argument("--temperature", type=float, metavar="T", help="of the samples; default 1")
    made.add_argument("--seed", type=int, metavar="S", help="of the samples; default: es.seed")
    made.add_argument("--kl", action="store_true", help="KL divergence from the initial model")
    made.add_argument("--drift", action="store_true", help="distance from the initial weights, by layers")
    made.add_argument(
        "--initial", metavar="MODEL", help="what --kl and --drift compare with; default: the run's"
    )
    made.add_argument("--json", metavar="FILE", help="write all figures and answers to this file")
    made.add_argument("--log", action="store_true", help="write figures and answers to the run file")
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError for what cannot be."""
    options = parser().parse_intermixed_args(arguments)
    if options.samples is not None and options.samples < 1:
        raise InputError(f"--samples: given {options.samples}, allowed is 1 or more; leave it out for greedy")
    if options.temperature is not None and not 0 < options.temperature < float("inf"):
        raise InputError(
            f"--temperature: given {options.temperature:g}, allowed is more than 0; leave it out for greedy"
        )
    if options.seed is not None and not 0 <= options.seed < 2**64:
        raise InputError(f"--seed: given {options.seed}, allowed is 0 to 2^64 - 1")
    return options


def main(comm: Comm, arguments: list[str]) -> int:
    options = collectives.together(comm, parse, arguments)
    log, subject = open_subject(comm, options)
    settings = subject.settings
    collectives.agree(comm, settings)
    # torch comes along: only once the command line is good.
    from mpies.evaluate.measure import load, measured
    from mpies.run.screen import Screen

    screen = Screen(comm.rank != 0, settings.run.progress)
    report = measured(load(comm, options, subject, screen.say))
    if comm.rank == 0:
        report.show(screen.console, settings.run.keep_samples)
        if log:
            as_trained = answers_as_trained(settings, subject.history)
            log.add_command(**report.tables(settings.run.keep_samples, as_trained))
            log.close()
            screen.say(f"wrote to {subject.path}")
            if not as_trained:
                screen.say("not into its /evaluation: that is for the run's own settings of task and engine")
        if options.json:
            report.write_json(Path(options.json))
            screen.say(f"wrote {options.json}")
    collectives.barrier(comm)
    return 0


def open_subject(comm: Comm, options: argparse.Namespace) -> tuple[RunFile | None, Subject]:
    """What is evaluated; with --log also the run file, on rank 0, locked against other jobs. Collective."""
    log: RunFile | None = None

    def look() -> tuple[Path | None, History | None]:
        nonlocal log
        refuse_unwritable(options.json)
        path = run_file(options.subject)
        if path is None:
            return None, None
        history = read_history(path)
        if options.log:
            log = locked(path, history)
            history = log.history()
        return path, history.first(which_generation(options.generation or "last", history))

    path, history = collectives.on_root(comm, look)
    settings = collectives.together(comm, settings_of, options, history)
    return log, Subject(settings, path, history)


def run_file(subject: str) -> Path | None:
    """The run file that is meant; None if it is a model."""
    path = Path(subject).expanduser()
    if (path / "run.h5").is_file() and not (path / "config.json").exists():
        return path / "run.h5"
    # What is called so must be there; a hub id is called otherwise.
    return path if path.is_file() or path.suffix in (".h5", ".hdf5") else None


def locked(path: Path, history: History) -> RunFile:
    """The run file, to be written to."""
    try:
        return RunFile.reopen(path, history.generations)
    except InputError as error:
        raise InputError(f"--log: {error}; leave it out, or wait until that job has ended") from None


def settings_of(options: argparse.Namespace, history: History | None) -> config.Settings:
    """The run's settings, or the configuration file's, with overrides. Raises InputError."""
    if history is None:
        for name in ("generation", "log"):
            if getattr(options, name):
                raise InputError(f"--{name}: {options.subject} is no run file, which this is for")
        if (options.kl or options.drift) and not options.initial:
            raise InputError("--kl and --drift: name the model to compare with, by --initial MODEL")
        return config.load([*options.settings, f"model.path={options.subject}", "run.directory=."])
    if options.log and options.initial:
        raise InputError(
            "--log: a run file tells how far its run is from its own initial model; leave out --initial or it"
        )
    for given in options.settings:
        if "=" not in given:
            raise InputError(f"{given}: a run has its own settings; give section.key=value to change one")
        if given.startswith(("es.", "model.master=")):
            raise InputError(f"{given}: what has made the run's weights cannot be changed; leave it out")
    return config.from_yaml(history.settings, [f"model.dtype={history.dtype}", *options.settings])


def answers_as_trained(settings: config.Settings, history: History) -> bool:
    """Are answers found and scored as the run itself does, so that figures can stand beside its own?"""
    own, now = config.from_yaml(history.settings).flat(), settings.flat()
    decisive = [key for key in now if key.startswith(("task.", "engine.")) and key not in config.CHANGEABLE]
    return settings.model.dtype == history.dtype and all(
        now[key] == own[key] for key in [*decisive, "run.threads"]
    )


def refuse_unwritable(json: str | None) -> None:
    """Raise InputError now if the JSON file could not be written at the end."""
    if json:
        path = Path(json).absolute()
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"--json: cannot write {json}; name a file in a folder that is there")
