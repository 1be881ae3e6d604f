"""What a generation was and what it cost: gathered on rank 0, logged, shown. No result depends on it."""

from __future__ import annotations

import math
import pickle
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.es import alignment
from mpies.es.answers import Agreement, Answers, compare
from mpies.es.population import Plan
from mpies.es.schedule import Step
from mpies.phases import PHASES, Phases
from mpies.ranks.collectives import gather_rows
from mpies.run.exchange import Evaluated, bytes_received
from mpies.runfile import COSINE, METRIC

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.run.job import Job

# Of a member's episodes, by the run file's names.
COUNTS = ("turns", "calls", "bad_calls", "cut", "failed", "replies")
COST = np.dtype(
    [("tokens", "<i8"), ("seconds", "<f8"), *((name, "<u8") for name in COUNTS), ("complaint", "S300")]
)

# The name under which the mean length of a member's answers is among the figures.
LENGTH = "answer_tokens"


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
    received: int = 0
    """Bytes that came to rank 0 with them and with the answers."""


@dataclass(frozen=True)
class Diagnosis:
    """What all members' answers tell of a generation; see es/answers.py and es/alignment.py."""

    agreement: Agreement
    truncated: float
    """The share of answers that ended because they were as long as they may be."""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> members' means, float64 (N,), NaN where a member has none."""
    cosines: dict[str, float] = field(default_factory=dict)
    """Name -> cosine of the metric's own update with the one that was made; the answers' length included."""


def record(job: Job, outcome: Outcome, mine: list[Evaluated]) -> None:
    """Commit the generation to the run file, show it, and say what is odd about it. Collective."""
    gathered = gather(job.comm, outcome.plan, job.phases, mine)
    if gathered is None or job.log is None:
        return
    costs, answers = gathered
    received = bytes_received(len(outcome.rewards), job.comm.size) + job.assignment.bytes_received
    with job.phases("log"):
        findings = find(outcome, costs, answers, job.settings.es.fitness)
        row, members = make_rows(outcome, costs, findings, job.phases.elapsed, received)
        job.log.append(row, members)
        if job.monitor:
            job.monitor.generation(outcome.generation + 1, row)
    job.screen.generation(row)
    job.advisor.look(outcome.generation, outcome.rewards, outcome.coefficients, findings)
    complaints = [text.decode(errors="replace") for text in costs.members["complaint"] if text]
    episodes = sum(len(one.marks) for one in answers)
    job.advisor.hear(outcome.generation, complaints, costs.members["cut"].sum() / episodes)


def gather(
    comm: Comm, plan: Plan, phases: Phases, mine: list[Evaluated]
) -> tuple[Costs, list[Answers]] | None:
    """Every rank's times, every member's costs and answers, on rank 0; None elsewhere. Collective.

    Two messages from each rank, the second as long as the first says: 16 bytes for an answer, some more for
    a member. Nobody waits for them but rank 0.
    """
    told = [(_cost(one), one.answers) for one in mine]
    parcel = np.frombuffer(pickle.dumps(told), dtype=np.uint8)
    spent = np.array([*phases.take().values(), len(parcel)], dtype=np.float64)
    times = gather_rows(comm, spent, [len(spent)] * comm.size)
    if times is None:
        gather_rows(comm, parcel, [])
        return None
    times = times.reshape(comm.size, -1)
    sizes = [int(size) for size in times[:, -1]]
    parcels = gather_rows(comm, parcel, sizes)
    assert parcels is not None, "this is rank 0"
    ends = np.cumsum(sizes).tolist()
    everyone = [
        one
        for end, size in zip(ends, sizes, strict=True)
        for one in pickle.loads(parcels[end - size : end].tobytes())
    ]
    ordered = [everyone[i] for i in plan.order]
    members = np.array([cost for cost, _ in ordered], dtype=COST)
    costs = Costs(members, times[:, :-1], times.nbytes + parcels.nbytes)
    return costs, [answers for _, answers in ordered]


def find(outcome: Outcome, costs: Costs, answers: list[Answers], fitness: str) -> Diagnosis:
    """What the answers, in member order, tell. `fitness`: how figures become coefficients, as rewards do."""
    marks = np.stack([one.marks for one in answers])
    rewards = np.stack([one.rewards for one in answers])
    names = sorted({name for one in answers for name in one.metrics})
    metrics = {name: np.array([one.metrics.get(name, math.nan) for one in answers]) for name in names}
    seeds, signs = outcome.plan.seeds, outcome.plan.signs
    figures = {**metrics, LENGTH: costs.members["tokens"] / marks.shape[1]}
    return Diagnosis(
        agreement=compare(marks, rewards, outcome.rewards, seeds),
        truncated=sum(one.truncated for one in answers) / marks.size,
        metrics=metrics,
        cosines={
            name: alignment.cosine(seeds, signs, outcome.coefficients, values, fitness)
            for name, values in figures.items()
        },
    )


def _cost(one: Evaluated) -> tuple:
    tally = one.tally
    counts = (getattr(tally, name) for name in COUNTS)
    return one.tokens, one.seconds, *counts, tally.complaint.encode(errors="replace")


def make_rows(
    outcome: Outcome, costs: Costs, findings: Diagnosis, seconds: float, received: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The generation's row and its members' rows for the run file, by column.

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
        "bytes_gathered": costs.received,
        **asdict(findings.agreement),
        "truncated": findings.truncated,
        **{COSINE + name: cosine for name, cosine in findings.cosines.items()},
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
        **{METRIC + name: values for name, values in findings.metrics.items()},
    }
    return row, members
