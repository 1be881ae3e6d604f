"""What a generation was and what it cost: gathered on rank 0, logged, shown. No result depends on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.es.population import Plan
from mpies.es.schedule import Step
from mpies.phases import PHASES, Phases
from mpies.ranks.collectives import gather_rows
from mpies.run.exchange import Evaluated, bytes_received

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.run.job import Job

# Of a member's episodes, by the run file's names.
COUNTS = ("turns", "calls", "bad_calls", "cut", "failed", "replies")
COST = np.dtype(
    [("tokens", "<i8"), ("seconds", "<f8"), *((name, "<u8") for name in COUNTS), ("complaint", "S300")]
)


@dataclass(frozen=True)
class Outcome:
    """A generation's result, the same on all ranks. rewards float64, coefficients float32: (N,)."""

    generation: int
    plan: Plan
    step: Step
    rewards: np.ndarray
    coefficients: np.ndarray
    digest: int


@dataclass(frozen=True)
class Costs:
    """members: COST (N,), in member order; phases: seconds, float64 (ranks, phases)."""

    members: np.ndarray
    phases: np.ndarray


def record(job: Job, outcome: Outcome, mine: list[Evaluated]) -> None:
    """Commit the generation to the run file, show it, and say what is odd about it. Collective."""
    costs = gather_costs(job.comm, outcome.plan, job.phases, mine)
    if costs is None or job.log is None:
        return
    received = bytes_received(job.comm, len(outcome.rewards))
    row, members = make_rows(outcome, costs, job.phases.elapsed, received)
    with job.phases("log"):
        job.log.append(row, members)
    job.screen.generation(row)
    job.advisor.look(outcome.generation, outcome.rewards, outcome.coefficients)
    job.advisor.hear(
        outcome.generation, [text.decode(errors="replace") for text in costs.members["complaint"] if text]
    )


def gather_costs(comm: Comm, plan: Plan, phases: Phases, mine: list[Evaluated]) -> Costs | None:
    """Every member's and every rank's, on rank 0; None elsewhere. Collective."""
    spent = gather_rows(comm, np.array(list(phases.take().values())), [len(PHASES)] * comm.size)
    costs = np.array([_cost(one) for one in mine], dtype=COST)
    gathered = gather_rows(comm, costs, plan.counts)
    if spent is None or gathered is None:
        return None
    return Costs(gathered[plan.order], spent.reshape(comm.size, -1))


def _cost(one: Evaluated) -> tuple:
    tally = one.tally
    counts = (getattr(tally, name) for name in COUNTS)
    return one.tokens, one.seconds, *counts, tally.complaint.encode()


def make_rows(
    outcome: Outcome, costs: Costs, seconds: float, received: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The generation's row and its members' rows for the run file.

    `seconds`: of the whole generation; `received`: bytes, by each rank.
    """
    scored = outcome.rewards[~np.isnan(outcome.rewards)].tolist()
    mean = math.fsum(scored) / len(scored)
    evaluation = costs.phases[:, : PHASES.index("reward") + 1].sum(axis=1)
    row = {
        "reward_mean": mean,
        "reward_std": math.sqrt(math.fsum((r - mean) * (r - mean) for r in scored) / len(scored)),
        "reward_min": min(scored),
        "reward_max": max(scored),
        "unscored": outcome.rewards.size - len(scored),
        "sigma": outcome.step.sigma,
        "alpha": outcome.step.alpha,
        "anchor_decay": outcome.step.anchor_decay,
        "digest": outcome.digest,
        "seconds": seconds,
        **{f"seconds_{p}": spent for p, spent in zip(PHASES, costs.phases.mean(axis=0), strict=True)},
        "seconds_log": costs.phases[0, PHASES.index("log")],
        "imbalance": evaluation.max() / evaluation.mean(),
        "tokens": int(costs.members["tokens"].sum()),
        "bytes_communicated": received,
    }
    members = {
        "seed": outcome.plan.seeds,
        "sign": outcome.plan.signs,
        "reward": outcome.rewards,
        "coefficient": outcome.coefficients,
        "rank": outcome.plan.rank_of,
        "tokens": costs.members["tokens"],
        "seconds": costs.members["seconds"],
        **{name: costs.members[name] for name in COUNTS},
    }
    return row, members
