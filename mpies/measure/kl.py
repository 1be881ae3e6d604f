"""The KL divergence of a tuned model to its initial model, estimated on answers of the tuned model.

Of every token that the tuned model pi has sampled, with r = pi_0 / pi of that token given those before
it, r - log r - 1 is an unbiased estimate of the divergence at that place, and never negative (J. Schulman
2020, "Approximating KL divergence", k3). The paper averages it over all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpies.config import Settings
from mpies.engines.base import Completions
from mpies.measure.evaluation import Sampling, rejoin, share
from mpies.measure.statistics import Figure, per_token
from mpies.ranks.collectives import allgather_objects, barrier
from mpies.tasks.base import Row

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.model.initial import InitialWeights
    from mpies.replica import Replica


def estimate_kl_beside(
    comm: Comm, replica: Replica, initial: InitialWeights, settings: Settings, split: str, sampling: Sampling
) -> Figure:
    """The divergence beside greedy answers to a split: on sampled ones to its first `run.kl_prompts` prompts.

    As `estimate_kl`. Collective.
    """
    rows = replica.task.splits[split][: settings.run.kl_prompts]
    return estimate_kl(comm, replica, initial, rows, settings.engine.batch_size, sampling)


def estimate_kl(
    comm: Comm,
    replica: Replica,
    initial: InitialWeights,
    rows: list[Row],
    batch_size: int,
    sampling: Sampling,
) -> Figure:
    """Nats per token, on answers that are sampled for it; the same on every rank. Collective."""
    answers = [
        replica.engine.sample([row["prompt"] for row in batch], draws)
        for batch, draws in share(comm, rows, batch_size, sampling)
        if draws
    ]
    return divergence(comm, replica, initial, rows, batch_size, sampling, answers)


def divergence(
    comm: Comm,
    replica: Replica,
    initial: InitialWeights,
    rows: list[Row],
    batch_size: int,
    sampling: Sampling,
    answers: list[Completions],
) -> Figure:
    """Nats per token, on `answers`: those to this rank's batches. The same on every rank. Collective.

    The live weights are the unperturbed ones, before and after; in between, they are the initial ones,
    written over them tensor by tensor, so that the memory of one tensor is needed. The base is only read.
    """
    asked = [[row["prompt"] for row in batch] for batch, _ in share(comm, rows, batch_size, sampling)]

    def read_likelihoods() -> list[list[np.ndarray]]:
        pairs = zip(asked, answers, strict=True)
        return [replica.engine.log_probabilities(p, a.ids, sampling.temperature) for p, a in pairs]

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


def k3(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """r - log r - 1 for log r = base - tuned, the log-probabilities of tokens: float64 (tokens,)."""
    log_ratio = base - tuned
    return np.expm1(log_ratio) - log_ratio  # exact where the ratio is near 1, too
