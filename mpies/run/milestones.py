"""Evaluations between the generations: when, and of what; of the unperturbed model, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpies.config import Settings
from mpies.measure.drift import measure_drift
from mpies.measure.evaluation import Evaluation, HasTime, Sampling, evaluate_rows, first_of
from mpies.measure.kl import estimate_kl_beside
from mpies.replica import Replica
from mpies.tasks.base import TrainerState

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Milestone:
    """A split's evaluation after so many generations."""

    generation: int
    split: str
    evaluation: Evaluation
    kl: float
    """From the initial model, nat/token; NaN: not measured."""
    drift: dict[str, float] | None

    def table_rows(self, keep: int):
        """For `RunFile.add_evaluation`, with the answers to the first `keep` prompts."""
        rows = self.evaluation.table_rows(self.generation, self.split, keep, self.kl, self.drift)
        return *rows, self.evaluation.prompt_rows(self.generation, self.split)


def is_due(generation: int, every: int, last: int) -> bool:
    """Due are the first, the last and every `every`-th generation; 0: the first and the last only."""
    return generation in (0, last) or bool(every and generation % every == 0)


def evaluate(
    comm: Comm, replica: Replica, settings: Settings, generation: int, splits: list[str], has_time: HasTime
) -> Iterator[Milestone]:
    """Evaluate one split after another; each is yielded before the next one begins. Collective.

    Raises OutOfTimeError on all ranks if `has_time` denied any rank a batch.
    """
    if not splits:
        return
    replica.perturbation.clear()
    initial, run = replica.initial, settings.run
    drift = measure_drift(comm, replica, initial) if run.measure_drift and initial else None
    state = TrainerState(generation, settings.es.generations)
    for split in splits:
        rows, batch = replica.task.splits[split], settings.engine.batch_size
        found = evaluate_rows(
            comm, replica.engine, replica.task, rows, batch, state, has_time=has_time, first=first_of(split)
        )
        scored = not math.isnan(found.reward_mean)
        kl = _measure_kl(comm, replica, settings, split, has_time) if scored else math.nan
        yield Milestone(generation, split, found, kl, drift)


def _measure_kl(comm: Comm, replica: Replica, settings: Settings, split: str, has_time: HasTime) -> float:
    """The KL divergence from the initial model, if it is measured on this split; else NaN."""
    samples, initial = settings.run.kl_samples, replica.initial
    if not samples or initial is None or split != list(replica.task.splits)[-1]:
        return math.nan
    sampling = Sampling.of(split, samples, settings.es.seed)
    return estimate_kl_beside(comm, replica, initial, settings, split, sampling, has_time).mean
