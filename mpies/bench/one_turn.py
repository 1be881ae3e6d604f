"""What the machinery of turns costs: a task's generation, and the same as an environment of one turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mpies.bench import asked
from mpies.bench.generation import SIGMA, Rig, Work, prompts_of
from mpies.bench.timing import Case, Timings, in_turns
from mpies.engines.hf import HfEngine
from mpies.es.population import Population
from mpies.tasks.base import Task
from mpies.tasks.environments.fork_server import Beginning
from mpies.tasks.environments.limits import Limits
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.environments.stage import TextStage
from mpies.tasks.environments.task import InProcesses
from mpies.tasks.episodes import EpisodeLimits

SECONDS, TURNS, TOKENS = (
    10,
    10,
    4096,
)  # task.call_seconds, task.max_turns, task.episode_tokens: their defaults


def measure(rig: Rig, work: Work, repeats: int, synchronize: Callable[[], None], say) -> Timings:
    """Seconds of low-rank generations, without their updates: as a task; as an environment, if it may have
    one turn (task.max_turns=1), and if it may have more, for which keys and values are kept."""
    task = Task("bench", [{"prompt": prompt} for prompt in prompts_of(work.prompts)], [], lengths)
    nursery = Nursery(Beginning(Limits.of(SECONDS), f"{asked.__name__}:{asked.OneTurn.__name__}"))

    def environment(turns: int) -> Task:
        limits = EpisodeLimits(turns, TOKENS)
        stage = InProcesses("task.environment", limits, 0.0, lambda made, _: TextStage(nursery, made, False))
        return replace(task, environments=stage)

    members = Population(work.members, seed=1).members(0)

    def generation(played: Task, engine: HfEngine) -> Callable[[], None]:
        def play() -> None:
            rig.lowrank.set(members, SIGMA)
            played.play(engine, played.starts(0), work.members)

        return play

    def engine(keeps: bool) -> HfEngine:
        return rig.engine(work.tokens, work.members * work.prompts, (lambda: 0) if keeps else None)

    ways = {
        "task": (task, engine(False)),
        "one turn": (environment(1), engine(False)),
        "one turn of more": (environment(TURNS), engine(True)),
    }
    cases = {name: Case(generation(*way), before=rig.stale) for name, way in ways.items()}
    try:
        return in_turns(cases, repeats, synchronize, say)
    finally:
        nursery.close()


def lengths(prompts, completions, **_: object) -> list[float]:
    return [float(len(text)) for text in completions]
