"""The task of one's own environment, or tools: rows, and what their episodes are played in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpies import config
from mpies.engines.base import Prompt
from mpies.engines.tools import Tools
from mpies.errors import InputError
from mpies.tasks import custom, data
from mpies.tasks.base import Reward, Row, Task
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

    nursery: Nursery
    limits: EpisodeLimits
    failure_reward: float
    chat: bool
    described: dict[str, dict[str, Any]] | None
    """Of each environment's name: its `tools`, as JSON schemas, and whether it `rewards`; None: it is one of
    plain text."""
    openings: list[Prompt] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self, episodes: Sequence[Episode], tools: Tools | None) -> Iterator[ProcessStage]:
        stage: ProcessStage
        if self.described is None:
            stage = TextStage(self.nursery, episodes, self.chat)
        else:
            schemas = {name: of["tools"] for name, of in self.described.items()}
            stage = ToolStage(self.nursery, episodes, schemas, tools)
        try:
            yield stage
        finally:
            stage.close()


def make_task(settings: config.TaskSettings, reward: Reward | None, seed: int) -> Task:
    """From the files that are set, or of as many rows as are set. Raises InputError.

    The first episodes are begun, twice: what cannot be or is not the same again is refused.
    """
    train, held_out = _rows(settings)
    factories = settings.factories
    beginning = Beginning(Limits.of(settings.call_seconds), settings.environment, factories, settings.tools)
    nursery = Nursery(beginning)
    setting = "task.environment_factory" if factories else "task.tools"
    described = None if settings.environment else describe(nursery, setting)
    if described and not reward and not all(one["rewards"] for one in described.values()):
        raise InputError("task.reward: missing, since there is an environment without `get_reward`")
    limits = EpisodeLimits(settings.max_turns, settings.episode_tokens)
    made = InProcesses(nursery, limits, settings.failure_reward, settings.chat_template, described)
    task = Task("environment", train, held_out, reward or nothing_more, seed=seed, environments=made)
    starts = [task.evaluated_starts(rows[:TRIED], range(len(rows[:TRIED]))) for rows in (train, held_out)]
    made.openings = try_openings(made, [one for some in starts for one in some], settings.services)
    return task


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
    """What the episodes begin with. Raises InputError if one fails, or begins otherwise at another time.

    `services`: the latter is allowed.
    """
    first, second = (_begun(environments, starts) for _ in range(2))
    for number, (one, again) in enumerate(zip(first, second, strict=True), 1):
        if one != again and not services:
            raise InputError(
                f"task.environment: the episode of row {number} began otherwise the second time, with the"
                " same seed: let it draw everything from `seed` or from the module `random`; or declare it,"
                " by task.services=true"
            )
    return first


def _begun(environments: InProcesses, starts: list[Start]) -> list[Prompt]:
    episodes = [Episode(start) for start in starts]
    with environments.open(episodes, None) as stage:
        for i, reply in stage.begin().items():
            episodes[i].take(reply)
    for number, one in enumerate(episodes, 1):
        if one.error:
            raise InputError(f"task.environment: row {number}: {one.error}")
    return [one.prompt for one in episodes]


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
