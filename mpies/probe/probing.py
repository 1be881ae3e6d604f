"""The probe: members at every sigma of a ladder, then steps with what they found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpies.config import Settings
from mpies.es.population import Population
from mpies.probe.climbing import climb
from mpies.probe.prompts import Prompts
from mpies.probe.recommendation import Tried, worth_a_step
from mpies.probe.rung import Base, Rung
from mpies.probe.steps import try_steps
from mpies.ranks.collectives import broadcast_object
from mpies.replica import Replica

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Probed:
    """What was answered, the same on every rank."""

    base: Base
    """The unperturbed model, on the members' prompts."""
    outcomes: list[Tried]
    """Of the ladder, in rising order."""
    prompts_per_generation: int
    """Of the run that is probed for."""
    rows: int
    """Training rows that there are."""
    repeated: bool
    """Were steps tried on the members' prompts, since there are too few others?"""

    @property
    def pairs(self) -> int:
        return len(self.outcomes[0].rung.rewards) // 2

    @property
    def ground(self) -> Base | None:
        """The unperturbed model, on all prompts of steps; None where no step was worth it."""
        tried = [step.ground for outcome in self.outcomes for step in outcome.steps]
        return max(tried, key=lambda ground: len(ground.rewards), default=None)

    @property
    def answers(self) -> int:
        """That all has cost."""
        answered = [self.base, *(step.after for outcome in self.outcomes for step in outcome.steps)]
        answered += [self.ground] if self.ground else []
        return sum(one.rewards.size for one in answered) + sum(one.rung.rewards.size for one in self.outcomes)


def probe(
    comm: Comm,
    settings: Settings,
    replica: Replica,
    ladder: tuple[float, ...],
    pairs: int,
    prompts: int,
    say: Callable[[str], None],
) -> Probed:
    """The unperturbed model's answers, and what comes of every sigma. Collective.

    Members are a run's first ones in antithetic pairs, whatever `es.antithetic` says, in its blocks.
    """
    es, task = settings.es, replica.task
    drawn = Prompts.draw(task, es.seed, prompts)
    population = Population(2 * pairs, es.seed, True, es.block_size)
    base, rungs = climb(comm, settings, replica, ladder, population, drawn, say)
    of_run = task.prompts_per_generation or len(task.train)
    outcomes = [Tried.of(base, rung, of_run, rungs[:at]) for at, rung in enumerate(rungs)]
    worth: list[Rung] = broadcast_object(comm, [outcome.rung for outcome in worth_a_step(outcomes)])
    rounds = drawn.rounds_of_steps(task)
    plan = population.plan(0, comm.size)
    steps = try_steps(comm, settings, replica, worth, plan, rounds, say) if worth else []
    tried = {rung.sigma: tuple(own) for rung, own in zip(worth, steps, strict=True)}
    outcomes = [replace(outcome, steps=tried.get(outcome.rung.sigma, ())) for outcome in outcomes]
    return Probed(base, outcomes, of_run, len(task.train), not drawn.others)
