"""The KL divergence of a tuned model to its initial model, estimated on answers of the tuned model.

Of every token that the tuned model pi has sampled, with r = pi_0 / pi of that token given those before
it, r - log r - 1 is an unbiased estimate of the divergence at that place, and never negative (J. Schulman
2020, "Approximating KL divergence", k3). The paper averages it over all tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from mpies.config import Settings
from mpies.engines.base import Engine
from mpies.measure.evaluation import HasTime, Sampling, always, rejoin, share
from mpies.measure.statistics import Figure, per_token
from mpies.ranks.collectives import allgather_objects, barrier
from mpies.tasks.base import Row
from mpies.tasks.episodes import Episode
from mpies.time_limit import OutOfTimeError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.model.initial import InitialWeights
    from mpies.replica import Replica


def estimate_kl_beside(
    comm: Comm,
    replica: Replica,
    initial: InitialWeights,
    settings: Settings,
    split: str,
    sampling: Sampling,
    has_time: HasTime = always,
) -> Figure:
    """The divergence beside greedy answers to a split: on sampled ones to its first `run.kl_prompts` prompts.

    As `estimate_kl`. Collective.
    """
    rows = replica.task.splits[split][: settings.run.kl_prompts]
    return estimate_kl(comm, replica, initial, rows, settings.engine.batch_size, sampling, has_time)


def estimate_kl(
    comm: Comm,
    replica: Replica,
    initial: InitialWeights,
    rows: list[Row],
    batch_size: int,
    sampling: Sampling,
    has_time: HasTime = always,
) -> Figure:
    """Nats per token, on answers that are sampled for it; the same on every rank. Collective.

    Raises OutOfTimeError on all ranks if `has_time` denied any rank a batch.
    """
    task, numbered = replica.task, list(enumerate(rows, sampling.first))
    made: list[list[Episode]] = []
    longest = 0.0
    batches = share(comm, numbered, batch_size, sampling)
    for batch, draws in batches:
        # All that were sampled are read twice more, which takes no longer than sampling them.
        if not has_time(longest, 2 * len(batches) - len(made)):
            break
        begun = time.perf_counter()
        starts = task.evaluated_starts([row for _, row in batch], [number for number, _ in batch])
        made.append(task.answer(replica.engine, starts, draws))
        longest = max(longest, time.perf_counter() - begun)
    if barrier(comm, word=len(made) < len(batches)):
        raise OutOfTimeError
    return divergence(comm, replica, initial, rows, batch_size, sampling, made)


def divergence(
    comm: Comm,
    replica: Replica,
    initial: InitialWeights,
    rows: list[Row],
    batch_size: int,
    sampling: Sampling,
    made: list[list[Episode]],
) -> Figure:
    """Nats per token, on the answers of the episodes `made`, those of this rank's batches. Collective.

    The same on every rank.
    The live weights are the unperturbed ones, before and after; in between, they are the initial ones,
    written over them tensor by tensor, so that the memory of one tensor is needed. The base is only read.
    """
    batches = [len(batch) for batch, _ in share(comm, rows, batch_size, sampling)]
    if list(map(len, made)) != batches:
        raise ValueError(f"episodes of batches {list(map(len, made))}, where this rank has {batches}")

    def read_likelihoods() -> list[list[np.ndarray]]:
        return [_likelihoods(replica.engine, batch, sampling.temperature) for batch in made]

    tuned = read_likelihoods()
    try:
        replica.weights.show(initial.items(replica.weights))
        base = read_likelihoods()
    finally:
        replica.weights.show_base()
    sums = [
        [(float(k3(b, t).sum()), len(t)) for b, t in zip(*batch, strict=True)]
        for batch in zip(base, tuned, strict=True)
    ]
    barrier(comm)
    everyone = [pair for batch in rejoin(allgather_objects(comm, sums)) for pair in batch]
    table = np.array(everyone, dtype=float).reshape(len(rows), sampling.samples, 2)
    return per_token(table[..., 0], table[..., 1])


def _likelihoods(engine: Engine, batch: list[Episode], temperature: float) -> list[np.ndarray]:
    """Log-probabilities of all tokens that were generated in each episode."""
    turns = [turn for one in batch for turn in one.turns]
    read = iter(engine.log_probabilities([t.prompt for t in turns], [t.ids for t in turns], temperature))
    return [np.concatenate([np.zeros(0), *(next(read) for _ in one.turns)]) for one in batch]


def k3(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """r - log r - 1 for log r = base - tuned, the log-probabilities of tokens: float64 (tokens,)."""
    log_ratio = base - tuned
    return np.expm1(log_ratio) - log_ratio  # exact where the ratio is near 1, too
