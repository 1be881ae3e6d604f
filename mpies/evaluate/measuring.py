"""The command's measurements: the weights that are meant, their answers, their distance from the initial."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpies.errors import InputError, RefusedError
from mpies.evaluate.report import Evaluand, Report
from mpies.evaluate.subject import Subject
from mpies.measure.drift import measure_drift
from mpies.measure.evaluation import Sampling, evaluate_rows, first_of
from mpies.measure.kl import divergence, estimate_kl_beside
from mpies.ranks.agreement import together
from mpies.replica import InitialUse, Replica, Setup, load, settle
from mpies.run import continuity, resume
from mpies.run.replaying import needs_anchor
from mpies.run.screen import rewards_shown
from mpies.runfile import History
from mpies.splits import spoken
from mpies.tasks.base import Row, Task, TrainerState

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

PAPER_KL_SAMPLES = 20


@dataclass(frozen=True)
class Measurement:
    """What is measured on, on every rank."""

    comm: Comm
    options: argparse.Namespace
    subject: Subject
    replica: Replica
    reward_digests: dict[str, str]
    """SHA-256 of the user's reward functions' files, by the functions' names."""
    rows: dict[str, list[Row]]
    """The prompts to evaluate, by split."""
    say: Callable[[str], None]


def assemble(
    comm: Comm, options: argparse.Namespace, subject: Subject, say: Callable[[str], None]
) -> Measurement:
    """The task, and the model with the weights that are meant. Collective; raises RefusedError."""
    settings, run = subject.settings, subject.run
    setup = settle(comm, settings)
    if run:
        refuse_unasked_changes(run.history, setup, options)
        setup = setup.of_run(run.history)
    for line in rewards_shown(setup.reward_digests):
        say(f"reward {line}")
    rows = together(comm, _choose_rows, setup.task, options.split)
    say(f"loading {settings.model.path} ...")
    compared = (options.initial or settings.model.path) if options.kl or options.drift else None
    anchored = bool(run and needs_anchor(run.history, 0, run.history.generations))
    replica = load(comm, settings, setup, InitialUse(anchored, compared))
    if run:
        if settings.model.master == "live" and replica.facts.dtype != run.history.dtype:
            raise RefusedError(
                f"model.dtype: given {replica.facts.dtype}, but the run's base weights are kept in that of"
                f" its live weights (model.master=live), {run.history.dtype}: leave it out"
            )
        resume.restore(comm, replica, run.history, run.path.parent)
    replica.perturbation.clear()
    replica.weights.show_base()
    return Measurement(comm, options, subject, replica, setup.reward_digests, rows, say)


def refuse_unasked_changes(history: History, setup: Setup, options: argparse.Namespace) -> None:
    """Raise RefusedError if prompts or rewards are not the run's, unless others are asked for."""
    asked = [given for given in options.settings if given.startswith("task.")]
    other_rewards = [given for given in asked if given.startswith(("task.reward=", "task.expects="))]
    if not any(given.startswith("task.reward=") for given in asked):
        continuity.refuse_other_rewards(
            history, setup.reward_digests, "to use it nonetheless, give task.reward=..."
        )
    if options.log:
        continuity.refuse_other_data(history, setup.task.digest)
    elif len(asked) == len(other_rewards):
        continuity.refuse_other_data(
            history, setup.task.digest, "to evaluate on other prompts, give task.train_data=..."
        )


def measure(measurement: Measurement) -> Report:
    """Everything that was asked for, the same on every rank. Collective."""
    subject, replica = measurement.subject, measurement.replica
    run, path = subject.run, subject.settings.model.path
    report = Report(
        Evaluand(
            model=path,
            run_file=str(run.path) if run else None,
            run_uuid=run.history.run_uuid if run else None,
            generation=subject.generation,
            digest=f"{replica.weights.digest():016x}",
            dtype=replica.facts.dtype,
            task=replica.task.name,
            data_digest=replica.task.digest,
            max_new_tokens=subject.settings.engine.max_new_tokens,
            initial=(measurement.options.initial or path) if replica.initial else None,
        )
    )
    for split in measurement.rows:
        _measure_split(measurement, split, report)
    if measurement.options.drift and replica.initial:
        report.drift = measure_drift(measurement.comm, replica, replica.initial)
    return report


def _measure_split(measurement: Measurement, split: str, report: Report) -> None:
    """Let the model answer a split's prompts, and score the answers."""
    rows, sampling = measurement.rows[split], _sampling(measurement, split)
    each = f"{sampling.samples} x " if sampling else ""
    measurement.say(f"answering {each}{len(rows)} {spoken(split)} prompts ...")
    settings = measurement.subject.settings
    state = TrainerState(measurement.subject.generation or 0, settings.es.generations)
    engine, batch = measurement.replica.engine, settings.engine.batch_size
    found = evaluate_rows(
        measurement.comm,
        engine,
        measurement.replica.task,
        rows,
        batch,
        state,
        sampling,
        first=first_of(split),
    )
    kl, initial = None, measurement.replica.initial
    if measurement.options.kl and initial and sampling:
        kl = divergence(measurement.comm, measurement.replica, initial, rows, batch, sampling, found.mine)
    elif measurement.options.kl and initial:
        # As training does it, with as many samples as the paper if training does not.
        samples = settings.run.kl_samples or PAPER_KL_SAMPLES
        sampled = Sampling.of(split, samples, _seed(measurement))
        kl = estimate_kl_beside(measurement.comm, measurement.replica, initial, settings, split, sampled)
    report.add(split, found, sampling, kl)


def _sampling(measurement: Measurement, split: str) -> Sampling | None:
    """How answers are sampled; None: greedy."""
    samples, temperature = measurement.options.samples, measurement.options.temperature
    if samples is None and temperature is None:
        return None
    return replace(Sampling.of(split, samples or 1, _seed(measurement)), temperature=temperature or 1.0)


def _seed(measurement: Measurement) -> int:
    """Of the samples."""
    given = measurement.options.seed
    return measurement.subject.settings.es.seed if given is None else given


def _choose_rows(task: Task, split: str) -> dict[str, list[Row]]:
    chosen = {name: rows for name, rows in task.splits.items() if split in (name, "all")}
    if not chosen:
        raise InputError(f"--split: given {split}, but this task has only {', '.join(task.splits)} prompts")
    return chosen
