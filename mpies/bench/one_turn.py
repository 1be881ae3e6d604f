"""What the machinery of turns costs: a task's generation, and the same as an environment of one turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from mpies.bench import asked
from mpies.bench.generation import SIGMA, Rig, Work, prompts_of
from mpies.bench.timing import Case, Timings, in_turns
from mpies.engines.base import Completions, Engine, Prompt
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
ALONE = 16  # generations without a model in a row: the end of one's processes is in the next one's time


def measure(rig: Rig, work: Work, repeats: int, synchronize: Callable[[], None], say) -> Timings:
    """Seconds of low-rank generations, without their updates: as a task; as an environment, if it may have
    one turn (task.max_turns=1), and if it may have more, for which keys and values are kept; and the
    environment's alone, whose answers are there at once."""
    task = Task("bench", [{"prompt": prompt} for prompt in prompts_of(work.prompts)], [], lengths)
    nursery = Nursery(Beginning(Limits.of(SECONDS), f"{asked.__name__}:{asked.OneTurn.__name__}"))

    def environment(turns: int) -> Task:
        limits = EpisodeLimits(turns, TOKENS)
        stage = InProcesses("task.environment", limits, 0.0, lambda made, _: TextStage(nursery, made, False))
        return replace(task, environments=stage)

    members = Population(work.members, seed=1).members(0)

    def alone() -> None:
        for _ in range(ALONE):
            several.play(silent, several.starts(0), work.members)

    def generation(played: Task, engine: HfEngine) -> Callable[[], None]:
        def play() -> None:
            rig.lowrank.set(members, SIGMA)
            played.play(engine, played.starts(0), work.members)

        return play

    def engine(keeps: bool) -> HfEngine:
        return rig.engine(work.tokens, work.members * work.prompts, (lambda: 0) if keeps else None)

    several = environment(TURNS)
    ways = {
        "task": (task, engine(False)),
        "one turn": (environment(1), engine(False)),
        "one turn of more": (several, engine(True)),
    }
    silent = cast(Engine, AtOnce(engine(False)))
    cases = {name: Case(generation(*way), before=rig.stale) for name, way in ways.items()}
    cases["turns alone"] = Case(alone, ALONE)
    try:
        return in_turns(cases, repeats, synchronize, say)
    finally:
        nursery.close()


class AtOnce:
    """As much of an engine as episodes need, without a model: what is left is the machinery of turns."""

    def __init__(self, engine: HfEngine):
        self.text, self.max_new_tokens = engine.text, engine.max_new_tokens

    def keep(self) -> None:
        return None

    def generate_each(self, prompts: list[Prompt], members: list[int], turns: object = None) -> Completions:
        """Each one's prompt again, up to where an answer has to end."""
        ids = [self.text.encode(prompt)[: self.max_new_tokens] for prompt in prompts]
        texts = [str(prompt) for prompt in prompts]
        return Completions(texts, [len(one) for one in ids], ids, [False] * len(prompts))


def lengths(prompts, completions, **_: object) -> list[float]:
    return [float(len(text)) for text in completions]
