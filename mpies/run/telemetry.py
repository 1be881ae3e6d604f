"""What a generation cost: gathered on rank 0, for the run file and the screen. No result depends on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.es.population import Plan
from mpies.es.schedule import Step
from mpies.phases import PHASES, Phases
from mpies.ranks import collectives

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.run.exchange import Evaluated

COST = np.dtype([("tokens", "<i8"), ("seconds", "<f8")])


def gather(
    comm: Comm, plan: Plan, phases: Phases, mine: list[Evaluated]
) -> tuple[np.ndarray, np.ndarray] | None:
    """On rank 0: members' tokens and seconds, COST (N,), and ranks' seconds (ranks, phases); else None."""
    spent = np.array(list(phases.take().values()))
    spent = collectives.gather_rows(comm, spent, [len(PHASES)] * comm.size)
    costs = np.array([(e.tokens, e.seconds) for e in mine], dtype=COST)
    costs = collectives.gather_rows(comm, costs, plan.counts)
    return (costs[plan.order], spent.reshape(comm.size, -1)) if comm.rank == 0 else None


def rows(
    step: Step,
    plan: Plan,
    rewards: np.ndarray,
    coefficients: np.ndarray,
    digest: int,
    cost: tuple[np.ndarray, np.ndarray],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The generation's row and its members' rows for the run file."""
    costs, seconds = cost
    scored = rewards[~np.isnan(rewards)].tolist()
    mean = math.fsum(scored) / len(scored)
    evaluation = seconds[:, : PHASES.index("reward") + 1].sum(axis=1)
    row = {
        "reward_mean": mean,
        "reward_std": math.sqrt(math.fsum((r - mean) * (r - mean) for r in scored) / len(scored)),
        "reward_min": min(scored),
        "reward_max": max(scored),
        "unscored": rewards.size - len(scored),
        "sigma": step.sigma,
        "alpha": step.alpha,
        "anchor_decay": step.anchor_decay,
        "digest": digest,
        **{f"seconds_{phase}": mean for phase, mean in zip(PHASES, seconds.mean(axis=0), strict=True)},
        "imbalance": evaluation.max() / evaluation.mean(),
        "tokens": int(costs["tokens"].sum()),
    }
    members = {
        "seed": plan.seeds,
        "sign": plan.signs,
        "reward": rewards,
        "coefficient": coefficients,
        "rank": plan.rank_of,
        "tokens": costs["tokens"],
        "seconds": costs["seconds"],
    }
    return row, members
