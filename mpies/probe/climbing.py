"""The ladder's answers: those of the unperturbed model, and at every sigma those of the same members."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpies.config import Settings
from mpies.es.answers import mark
from mpies.es.population import Member, Population
from mpies.es.symptoms import ACCURACY
from mpies.measure.evaluation import evaluate_rows
from mpies.phases import Phases
from mpies.probe.prompts import Prompts
from mpies.probe.rung import Base, Rung
from mpies.ranks.collectives import allgather_objects
from mpies.replica import Replica
from mpies.run.block import judge_block
from mpies.tasks.base import Played, Row, TrainerState

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Judged:
    """A member's answers to the prompts."""

    member: int
    answers: Base
    marks: np.ndarray
    """(prompts,); see Rung."""


def climb(
    comm: Comm,
    settings: Settings,
    replica: Replica,
    ladder: tuple[float, ...],
    population: Population,
    prompts: Prompts,
    say: Callable[[str], None],
) -> tuple[Base, list[Rung]]:
    """The unperturbed model's answers and those at every sigma, the same on every rank. Collective.

    Each block at each sigma is a piece of work, and ranks take turns.
    """
    rows = prompts.members
    say(
        f"answering {len(rows)} training prompts: the unperturbed model, then {population.size} members at"
        f" {len(ladder)} sigmas, {(1 + population.size * len(ladder)) * len(rows)} answers"
    )
    state = TrainerState(0, settings.es.generations)
    starts = prompts.starts_of_members(replica.task)
    base = _stand_below(comm, settings, replica, rows, state)
    work = list(_pieces(population, ladder))[comm.rank :: comm.size]
    mine = []
    for done, (rung, block) in enumerate(work, 1):
        judged = judge_block(replica, starts, block, ladder[rung], state, Phases())
        mine += [(rung, _noted(member, one)) for member, one in zip(block, judged, strict=True)]
        say(f"block {done} of {len(work)} that are rank 0's, at sigma {ladder[rung]:g}")
    everyone = [one for part in allgather_objects(comm, mine) for one in part]
    return base, [
        _rung(sigma, sorted((m for r, m in everyone if r == rung), key=lambda m: m.member))
        for rung, sigma in enumerate(ladder)
    ]


def _pieces(population: Population, ladder: tuple[float, ...]) -> Iterator[tuple[int, list[Member]]]:
    """(rung, block) of every block at every sigma, the largest first: they give the longest answers."""
    blocks = population.blocks(0)
    yield from ((rung, block) for rung in reversed(range(len(ladder))) for block in blocks)


def _stand_below(
    comm: Comm, settings: Settings, replica: Replica, rows: list[Row], state: TrainerState
) -> Base:
    replica.perturbation.clear()
    found = evaluate_rows(comm, replica.engine, replica.task, rows, settings.engine.batch_size, state)
    cut = allgather_objects(comm, sum(one.truncated for batch in found.mine for one in batch))
    unknown = np.full(len(rows), np.nan)
    return Base(found.rewards, found.metrics.get(ACCURACY, unknown), found.tokens, sum(cut) / len(rows))


def _noted(member: Member, played: Played) -> Judged:
    marks = np.array([mark(one.said) for one in played.episodes], dtype=np.uint64)
    return Judged(member.index, Base.of(played), marks)


def _rung(sigma: float, members: list[Judged]) -> Rung:
    answers = [one.answers for one in members]
    return Rung(
        sigma=sigma,
        rewards=np.stack([one.rewards for one in answers]),
        accuracies=np.stack([one.accuracies for one in answers]),
        marks=np.stack([one.marks for one in members]),
        tokens=np.stack([one.tokens for one in answers]),
        truncated=sum(one.truncated for one in answers) / len(answers),
    )
