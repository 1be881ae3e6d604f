"""The task of one's own environment: rows, and what their episodes are played in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mpies import config
from mpies.engines.base import Prompt
from mpies.errors import InputError
from mpies.tasks import custom, data
from mpies.tasks.base import Reward, Row, Task
from mpies.tasks.environments.fork_server import Beginning
from mpies.tasks.environments.limits import Limits
from mpies.tasks.environments.nursery import Nursery
from mpies.tasks.environments.stage import TextStage
from mpies.tasks.episodes import Episode, EpisodeLimits, Start

TRIED = 2  # rows of each split whose episodes are begun at the start


@dataclass
class TextEnvironments:
    """Environments of plain text; see contract.py."""

    nursery: Nursery
    limits: EpisodeLimits
    failure_reward: float
    chat: bool
    openings: list[Prompt] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self, episodes: Sequence[Episode]) -> Iterator[TextStage]:
        stage = TextStage(self.nursery, episodes, self.chat)
        try:
            yield stage
        finally:
            stage.close()


def make_task(settings: config.TaskSettings, reward: Reward | None, seed: int) -> Task:
    """From the files that are set, or of as many rows as are set. Raises InputError.

    The first episodes are begun, twice: what cannot be or is not the same again is refused.
    """
    train, held_out = _rows(settings)
    nursery = Nursery(Beginning(settings.environment, Limits.of(settings.call_seconds)))
    limits = EpisodeLimits(settings.max_turns, settings.episode_tokens)
    made = TextEnvironments(nursery, limits, settings.failure_reward, settings.chat_template)
    task = Task("environment", train, held_out, reward or nothing_more, seed=seed, environments=made)
    starts = [task.evaluated_starts(rows[:TRIED], range(TRIED)) for rows in (train, held_out)]
    made.openings = try_openings(made, [one for some in starts for one in some], settings.services)
    return task


def nothing_more(prompts, completions, **_) -> list[float]:
    """The reward functions' share where there are none."""
    return [0.0] * len(completions)


def try_openings(environments: TextEnvironments, starts: list[Start], services: bool) -> list[Prompt]:
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


def _begun(environments: TextEnvironments, starts: list[Start]) -> list[Prompt]:
    episodes = [Episode(start) for start in starts]
    with environments.open(episodes) as stage:
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
    return custom.check_row(given, column) if column in given else custom.check_names(given)
