"""Evaluations between the generations: of the unperturbed model, on all ranks, into the run file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mpies.measure.drift import measure_drift
from mpies.measure.evaluation import Sampling, evaluate_rows
from mpies.measure.kl import estimate_kl_beside
from mpies.splits import TRAIN, spoken
from mpies.tasks.base import TrainerState

if TYPE_CHECKING:
    from mpies.run.job import Job


def is_due(generation: int, every: int, last: int) -> bool:
    """Due are the first, the last and every `every`-th generation; 0: the first and the last only."""
    return generation in (0, last) or bool(every and generation % every == 0)


def evaluate(job: Job, generation: int) -> bool:
    """Evaluate training and held-out prompts where that is due and not in the run file yet. Collective.

    Returns whether anything was. Raises OutOfTimeError on all ranks if there is no time for it: the next
    start makes up for it.
    """
    run, last = job.settings.run, job.settings.es.generations
    if not is_due(generation, run.evaluate_every, last):
        return False
    missing = {s: rows for s, rows in job.task.splits.items() if (generation, s) not in job.evaluated}
    if not missing:
        return False
    job.replica.perturbation.clear()
    initial = job.replica.initial
    drift = measure_drift(job.comm, job.replica, initial) if run.measure_drift and initial else None
    state = TrainerState(generation, last)
    for split, rows in missing.items():
        batch = job.settings.engine.batch_size
        found = evaluate_rows(
            job.comm, job.replica.engine, job.task, rows, batch, state, has_time=job.has_time_for_batches
        )
        if math.isnan(found.reward_mean):  # a reward function that is mended will have its say
            job.screen.say(f"warning: no answer to the {spoken(split)} prompts could be scored")
            continue
        if split == TRAIN:
            job.advisor.unperturbed = found.reward_mean
        kl = _kl(job, split)
        if job.log:
            job.log.add_evaluation(*found.table_rows(generation, split, run.keep_samples, kl, drift))
    return True


def _kl(job: Job, split: str) -> float:
    """The KL divergence from the initial model, nat/token, if it is measured on this split; else NaN."""
    run, initial = job.settings.run, job.replica.initial
    if not run.kl_samples or initial is None or split != list(job.task.splits)[-1]:
        return math.nan
    sampling = Sampling.of(split, run.kl_samples, job.settings.es.seed)
    return estimate_kl_beside(job.comm, job.replica, initial, job.settings, split, sampling).mean
