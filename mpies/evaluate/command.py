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
from pathlib import Path
from typing import TYPE_CHECKING

from mpies.command_line import EXIT_CODES, HelpFormatter, Parser
from mpies.errors import InputError
from mpies.evaluate.subject import answers_as_trained, open_subject
from mpies.files import refuse_unwritable
from mpies.ranks.agreement import on_root, together
from mpies.ranks.collectives import barrier
from mpies.splits import HELD_OUT, TRAIN

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


MOST_SAMPLES = 10**6  # of a prompt


def parser() -> Parser:
    made = Parser(
        prog="mpirun -n N python -m mpies.evaluate",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=HelpFormatter,
    )
    made.add_argument(
        "subject", metavar="RUN|MODEL", help="run.h5 or its folder; or a model folder or hub id"
    )
    made.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG.yaml|section.key=value",
        default=[],
        help="of a model; of a run, values only",
    )
    made.add_argument(
        "--generation", metavar="G", help="of a run: a number, best (held out), or last (default)"
    )
    made.add_argument("--split", choices=[TRAIN, HELD_OUT, "all"], default="all", help="default: all")
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
    if options.samples is not None and not 1 <= options.samples <= MOST_SAMPLES:
        raise InputError(
            f"--samples: given {options.samples}, allowed is 1 to {MOST_SAMPLES}; leave it out for greedy"
        )
    if options.temperature is not None and not 0 < options.temperature < float("inf"):
        raise InputError(
            f"--temperature: given {options.temperature:g}, allowed is more than 0; leave it out for greedy"
        )
    if options.seed is not None and not 0 <= options.seed < 2**64:
        raise InputError(f"--seed: given {options.seed}, allowed is 0 to 2^64 - 1")
    return options


def main(comm: Comm, arguments: list[str]) -> int:
    options = together(comm, parse, arguments)
    on_root(comm, refuse_unwritable, "--json", options.json)
    log, subject = open_subject(comm, options)
    # torch comes along: only once the command line is good.
    from mpies.evaluate.measuring import assemble, measure
    from mpies.run.screen import Screen

    run, keep = subject.run, subject.settings.run.keep_samples
    screen = Screen(comm.rank != 0, subject.settings.run.progress)
    if run and run.history.damage.damaged:
        screen.say(f"warning: {run.path}: {run.history.damage}")
    measurement = assemble(comm, options, subject, screen.say)
    report = measure(measurement)
    if comm.rank == 0:
        report.show(screen.console, keep)
        if log and run:
            as_trained = answers_as_trained(subject.settings, run.history, measurement.reward_digests)
            log.add_command(**report.tables(run.history.generations, keep, as_trained))
            log.close()
            screen.say(f"wrote to {run.path}")
            if not as_trained:
                screen.say("not into its /evaluation: that is for the run's own settings of task and engine")
        if options.json:
            report.write_json(Path(options.json))
            screen.say(f"wrote {options.json}")
    barrier(comm)
    return 0
