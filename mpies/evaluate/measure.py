"""The command's measurements: the weights that are meant, their answers, their distance from the initial."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpies import replica as replicas
from mpies.errors import InputError, RefusedError
from mpies.evaluate.command import Subject
from mpies.evaluate.report import Report
from mpies.measure.drift import drift
from mpies.measure.evaluation import HELD_OUT, Sampling, evaluate
from mpies.measure.kl import divergence, estimate
from mpies.measure.statistics import Figure
from mpies.model.anchor import Anchor
from mpies.model.initial import Files, Loaded, source
from mpies.ranks import collectives
from mpies.replica import Replica
from mpies.run import resume
from mpies.run.job import shared_task
from mpies.run.replaying import needs_anchor
from mpies.tasks.base import Row, Task, TrainerState

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

PAPER_KL_SAMPLES = 20


@dataclass(frozen=True)
class Bench:
    """What is measured on, on every rank."""

    comm: Comm
    options: argparse.Namespace
    subject: Subject
    task: Task
    rows: dict[str, list[Row]]
    """The prompts to evaluate, by split."""
    replica: Replica
    initial: Files | Loaded | None
    """Where to read the initial weights from, if they are asked for."""
    say: Callable[[str], None]


def load(comm: Comm, options: argparse.Namespace, subject: Subject, say: Callable[[str], None]) -> Bench:
    """The task, and the model with the weights that are meant. Collective; raises RefusedError."""
    settings = subject.settings
    task = shared_task(comm, settings, subject.history if options.log else None)
    rows = collectives.together(comm, _chosen, task, options.split)
    say(f"loading {settings.model.path} ...")
    replica = replicas.build(comm, settings, task)
    initial = None
    if options.kl or options.drift:
        named = options.initial, replica.weights, None
        own = settings.model.path, replica.weights, replica.facts["model_digest"]
        initial = collectives.together(comm, source, *(named if options.initial else own))
    if subject.history:
        _restore(comm, subject, replica)
    replica.perturbation.clear()
    replica.weights.show_base()
    return Bench(comm, options, subject, task, rows, replica, initial, say)


def measured(bench: Bench) -> Report:
    """Everything that was asked for, the same on every rank. Collective."""
    subject, facts = bench.subject, bench.replica.facts
    report = Report(
        facts={
            "model": subject.settings.model.path,
            "run_file": str(subject.path) if subject.path else None,
            "run_uuid": subject.history.run_uuid if subject.history else None,
            "generation": subject.generation,
            "digest": f"{bench.replica.weights.digest():016x}",
            "dtype": facts["dtype"],
            "task": bench.task.name,
            "data_digest": bench.task.digest,
            "max_new_tokens": subject.settings.engine.max_new_tokens,
            "initial": (bench.options.initial or subject.settings.model.path) if bench.initial else None,
        }
    )
    for split in bench.rows:
        _measure_split(bench, split, report)
    if bench.options.drift:
        report.drift = drift(bench.comm, bench.replica, bench.initial)
    return report


def _measure_split(bench: Bench, split: str, report: Report) -> None:
    """Let the model answer a split's prompts, and score the answers."""
    rows, sampling = bench.rows[split], _sampling(bench, split)
    each = f"{sampling.samples} x " if sampling else ""
    bench.say(f"answering {each}{len(rows)} {split.replace('_', '-')} prompts ...")
    settings = bench.subject.settings
    state = TrainerState(bench.subject.generation or 0, settings.es.generations)
    engine, batch = bench.replica.engine, settings.engine.batch_size
    found = evaluate(bench.comm, engine, bench.task, rows, batch, state, sampling)
    kl = None
    if bench.options.kl and sampling:
        kl = divergence(bench.comm, bench.replica, bench.initial, rows, batch, sampling, found.mine)
    elif bench.options.kl:
        kl = _estimate(bench, split)
    report.add(split, found, sampling, kl)


def _estimate(bench: Bench, split: str) -> Figure:
    """The KL divergence where answers are greedy: on sampled ones, as training does it."""
    settings, rows = bench.subject.settings, bench.rows[split]
    samples = settings.run.kl_samples or PAPER_KL_SAMPLES
    sampling = dataclasses.replace(_default_sampling(bench, split), samples=samples)
    some = rows[: settings.run.kl_prompts]
    return estimate(bench.comm, bench.replica, bench.initial, some, settings.engine.batch_size, sampling)


def _sampling(bench: Bench, split: str) -> Sampling | None:
    """How answers are sampled; None: greedy."""
    samples, temperature = bench.options.samples, bench.options.temperature
    if samples is None and temperature is None:
        return None
    default = _default_sampling(bench, split)
    return dataclasses.replace(default, samples=samples or 1, temperature=temperature or 1.0)


def _default_sampling(bench: Bench, split: str) -> Sampling:
    seed = bench.options.seed
    seed = bench.subject.settings.es.seed if seed is None else seed
    return Sampling(1, 1.0, seed, HELD_OUT if split == "held_out" else 0)


def _chosen(task: Task, split: str) -> dict[str, list[Row]]:
    chosen = {name: rows for name, rows in task.splits.items() if split in (name, "all")}
    if not chosen:
        raise InputError(f"--split: given {split}, but this task has only {', '.join(task.splits)} prompts")
    return chosen


def _restore(comm: Comm, subject: Subject, replica: Replica) -> None:
    """Bring the base to the run's generation. Collective."""
    asked, own = replica.facts["dtype"], subject.history.dtype
    if subject.settings.model.master == "live" and asked != own:
        raise RefusedError(
            f"model.dtype: given {asked}, but the run's base weights are kept in that of its live weights"
            f" (model.master=live), {own}: leave it out"
        )
    # The base is the run's, whatever dtype its answers are computed in here.
    history = dataclasses.replace(subject.history, dtype=replica.facts["dtype"])
    anchor = None
    if needs_anchor(history, 0, history.generations):
        origin = subject.settings.model.path, replica.weights, replica.facts["model_digest"]
        anchor = collectives.together(comm, Anchor, *origin)
    folder = subject.path.parent
    resume.restore(comm, replica.weights, history, replica.facts, folder, anchor, _quiet)


def _quiet(text: str) -> None:
    """Nothing is resumed here: what restoring has to say would mislead."""
