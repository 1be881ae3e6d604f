"""The task of one's own environment, tools or agent: rows, and what their episodes are played in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpies import config
from mpies.engines.base import Encoder, Prompt
from mpies.errors import InputError
from mpies.tasks import custom, data
from mpies.tasks.base import Reward, Row, Task
from mpies.tasks.environments.agent_stage import AgentStage
from mpies.tasks.environments.children import Call
from mpies.tasks.environments.fork_server import Beginning
from mpies.tasks.environments.limits import Limits
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.environments.stage import ProcessStage, TextStage
from mpies.tasks.environments.tool_contract import ONLY
from mpies.tasks.environments.tool_stage import ToolStage
from mpies.tasks.episodes import Episode, EpisodeLimits, Start

TRIED = 2  # rows of each split whose episodes are begun at the start


@dataclass
class InProcesses:
    """Environments in processes of their own."""

    setting: str
    limits: EpisodeLimits
    failure_reward: float
    stage: Callable[[Sequence[Episode], Encoder | None], ProcessStage]
    """Of some episodes, told by an encoder; None: no answer will be read."""
    openings: list[Prompt] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self, episodes: Sequence[Episode], text: Encoder | None) -> Iterator[ProcessStage]:
        stage = self.stage(episodes, text)
        try:
            yield stage
        finally:
            stage.close()


def make_task(settings: config.TaskSettings, reward: Reward | None, seed: int) -> Task:
    """From the files that are set, or of as many rows as are set. Raises InputError.

    The first episodes are begun, twice: what cannot be or is not the same again is refused.
    """
    train, held_out = _rows(settings)
    beginning = Beginning(
        Limits.of(settings.call_seconds),
        settings.environment,
        settings.factories,
        settings.tools,
        settings.agent,
    )
    limits = EpisodeLimits(settings.max_turns, settings.episode_tokens)
    stage = _stages(settings, beginning, bool(reward))
    made = InProcesses(beginning.setting, limits, settings.failure_reward, stage)
    task = Task("environment", train, held_out, reward or nothing_more, seed=seed, environments=made)
    starts = [task.evaluated_starts(rows[:TRIED], range(len(rows[:TRIED]))) for rows in (train, held_out)]
    made.openings = try_openings(made, [one for some in starts for one in some], settings.services)
    return task


def _stages(
    settings: config.TaskSettings, beginning: Beginning, rewarded: bool
) -> Callable[[Sequence[Episode], Encoder | None], ProcessStage]:
    """How a stage is made of some episodes. Raises InputError if the user's code is not what it has to be."""
    nursery = Nursery(beginning)
    if settings.agent:
        return lambda episodes, text: AgentStage(nursery, episodes, text)
    if settings.environment:
        return lambda episodes, text: TextStage(nursery, episodes, settings.chat_template)
    described = describe(nursery, beginning.setting)
    if not rewarded and not all(one["rewards"] for one in described.values()):
        raise InputError("task.reward: missing, since there is an environment without `get_reward`")
    schemas = {name: one["tools"] for name, one in described.items()}
    return lambda episodes, text: ToolStage(nursery, episodes, schemas, text.tools if text else None)


def describe(nursery: Nursery, setting: str) -> dict[str, dict[str, Any]]:
    """What there is of environments and tools. Raises InputError for what transformers cannot describe."""
    (key,) = nursery.numbers(1)
    (said,) = nursery.call([Call(key, "describe", {})], [key])
    if "error" in said:
        raise InputError(f"{setting}: {said['error']}")
    found = said["environments"]
    for name, one in found.items():
        if not one["tools"]:
            which = f" of {name!r}" if name != ONLY else ""
            raise InputError(
                f"{setting}: the class{which} has no tools, which are public methods; one that"
                " takes answers as they are is a task.environment"
            )
    return found


def nothing_more(prompts, completions, **_) -> list[float]:
    """The reward functions' share where there are none."""
    return [0.0] * len(completions)


def try_openings(environments: InProcesses, starts: list[Start], services: bool) -> list[Prompt]:
    """What the episodes begin with. Raises InputError if one fails, or begins otherwise at another time, or
    if none asks the model.

    `services`: the latter is allowed.
    """
    first, second = (_begun(environments, starts) for _ in range(2))
    for number, (one, again) in enumerate(zip(first, second, strict=True), 1):
        if one != again and not services:
            raise InputError(
                f"{environments.setting}: the episode of row {number} began otherwise the second time, with"
                " the same seed: let it draw everything from `seed` or from the module `random`; or declare"
                " it, by task.services=true"
            )
    asked = [one for one in first if one]
    if first and not asked:
        raise InputError(f"{environments.setting}: row 1: its episode ended before the model was asked")
    return asked


def _begun(environments: InProcesses, starts: list[Start]) -> list[Prompt]:
    """What each begins with; nothing, where it ended at once."""
    episodes = [Episode(start) for start in starts]
    with environments.open(episodes, None) as stage:
        for i, reply in stage.begin().items():
            episodes[i].take(reply)
    for number, one in enumerate(episodes, 1):
        if one.error:
            raise InputError(f"{environments.setting}: row {number}: {one.error}")
    return ["" if one.ended else one.prompt for one in episodes]


def _rows(settings: config.TaskSettings) -> tuple[list[Row], list[Row]]:
    """A file's, or empty ones: then the environment makes up everything from its seed."""
    if settings.train_data:
        return data.read_splits(settings, lambda row: check_row(row, settings.prompt_column))
    if not settings.train_size:
        raise InputError(
            "task.train_data: missing; or, if the environment makes up its episodes from their seeds, set"
            " task.train_size to how many there are"
        )
    return [{} for _ in range(settings.train_size)], [{} for _ in range(settings.eval_size)]


def check_row(given: Row, column: str) -> Row:
    """A row, with its prompt checked if it has one. Raises InputError."""
    return custom.check_names(given) if given.get(column) is None else custom.check_row(given, column)
