"""A task: rows with prompts for training and for evaluation, and a reward function.

A row is a dictionary with `prompt` (text, or chat messages) and any other columns. The reward function
is called as TRL's GRPOTrainer calls it, so that either program's functions work in the other:

    reward(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=, **columns)
        -> list[float | None]

Completions are texts where prompts are texts, and lists with one assistant message where prompts are
chat messages.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mpies.engines.base import Draws, Encoder, Engine, Prompt, owners
from mpies.engines.image import images_in
from mpies.errors import InputError
from mpies.splits import HELD_OUT, TRAIN
from mpies.tasks import episodes, epochs, expected
from mpies.tasks.environments.contract import LARGEST, shown
from mpies.tasks.environments.seeds import seeds
from mpies.tasks.episodes import (
    FAILED,
    Clock,
    Environments,
    Episode,
    EpisodeLimits,
    Row,
    SingleAnswers,
    Stage,
    Start,
)

Reward = Callable[..., Sequence[float | None]]
Metrics = Callable[[list[Row], list[str]], Mapping[str, Sequence[float]]]

# Columns that TRL does not pass on either.
NOT_PASSED = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class TrainerState:
    """What reward functions see of transformers' TrainerState: updates made so far, and in all."""

    global_step: int = 0
    max_steps: int = 0


@dataclass(frozen=True)
class Scores:
    """Of each answer: its reward and its metrics, float64 (answers,), NaN where it has none."""

    rewards: np.ndarray
    metrics: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Played:
    """Episodes of one member, or of the unperturbed model, and what they are worth."""

    episodes: list[Episode]
    scores: Scores


@dataclass(frozen=True)
class Task:
    """`train` rows give the members' rewards; `held_out` rows are evaluated only.

    `metrics(rows, texts)` gives further figures of each answer for evaluations, by name; `accuracy`
    is the one that says whether it is right (1 or 0). They are no part of the reward.
    """

    name: str
    train: list[Row]
    held_out: list[Row]
    reward: Reward
    metrics: Metrics | None = None
    prompts_per_generation: int = 0
    seed: int = 0
    """Of the prompts' order, if a generation uses some of them only, and of what environments draw."""
    environments: Environments | None = None
    """What episodes of several turns are played in; None: a row is a prompt, and an answer is the end."""
    expects: expected.Expects | None = None
    """Says of answers what should have been in them, for reward functions to be told how likely that was."""

    def numbers(self, generation: int) -> list[int]:
        """The numbers of the training rows that all members of a generation answer."""
        if not self.prompts_per_generation:
            return list(range(len(self.train)))
        return epochs.sample(self.seed, generation, len(self.train), self.prompts_per_generation).tolist()

    def rows(self, generation: int) -> list[Row]:
        """Those rows."""
        return [self.train[i] for i in self.numbers(generation)]

    def starts(self, generation: int) -> list[Start]:
        """How the episodes of all members of a generation begin."""
        return self._starts(self.rows(generation), self.numbers(generation), generation)

    def evaluated_starts(self, rows: list[Row], numbers: Sequence[int]) -> list[Start]:
        """How episodes with rows of these numbers begin, in evaluations."""
        return self._starts(rows, numbers, None)

    def _starts(self, rows: list[Row], numbers: Sequence[int], generation: int | None) -> list[Start]:
        if self.environments is None:
            return [Start(row) for row in rows]
        return list(map(Start, rows, seeds(self.seed, numbers, generation)))

    @property
    def prompts(self) -> Iterator[Prompt]:
        """All prompts that may be answered; of environments, those of the rows and some that were tried."""
        given = (row["prompt"] for row in [*self.train, *self.held_out] if row.get("prompt"))
        return itertools.chain(given, self.environments.openings if self.environments else [])

    @property
    def has_turns(self) -> bool:
        """Can an episode have more than one?"""
        return self.environments is not None and self.environments.limits.turns != 1

    @cached_property
    def has_images(self) -> bool:
        return any(images_in(prompt) for prompt in self.prompts)

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        """What evaluations evaluate.

        Where a generation uses some of the training rows only, there may be very many of them: then
        as many as are held out, or as a generation uses, whichever is more.
        """
        shown = max(self.prompts_per_generation, len(self.held_out))
        train = self.train[:shown] if self.prompts_per_generation else self.train
        return {name: rows for name, rows in ((TRAIN, train), (HELD_OUT, self.held_out)) if rows}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows: the same for the same rows, whatever kind of file they came from."""
        total = hashlib.sha256()
        for table in (self.train, self.held_out):
            for row in table:
                total.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            total.update(b"\n")
        return total.hexdigest()

    def play(
        self,
        engine: Engine,
        starts: list[Start],
        members: int | None = None,
        draws: Draws | None = None,
        state: TrainerState | None = None,
        clock: Clock = lambda phase: contextlib.nullcontext(),
    ) -> list[Played]:
        """Play the episodes with each member of a block, all together; what each member comes to.

        members None: with the unperturbed model, whose answers are sampled if there are `draws`, one for each
        start.
        """
        made = [Episode(start) for _ in range(members or 1) for start in starts]
        answer = episodes.answers_of(engine, len(starts) if members else None, draws)
        with self._played(engine, made, answer, clock) as stage:
            cuts = [slice(i, i + len(starts)) for i in range(0, len(made), len(starts) or 1)]
            more: dict[str, Sequence[Any]] = {}
            if stage.environments:
                more["environments"] = stage.environments
            if self.expects:
                with clock("reward"):
                    asked = [one for cut in cuts for one in self._expected(made[cut], state)]
                with clock("generate"):
                    of = owners(len(starts), members) if members else None
                    prompts = [one.start.row["prompt"] for one in made]
                    more[expected.COLUMN] = expected.read(engine, prompts, asked, of)
            with clock("reward"):
                each = [(made[cut], {name: values[cut] for name, values in more.items()}) for cut in cuts]
                return [Played(own, self._judge_episodes(own, state, columns)) for own, columns in each]

    def _expected(
        self, played: list[Episode], state: TrainerState | None
    ) -> list[expected.Continuation | None]:
        """What should have been in a member's answers; what the function logs is not kept."""
        assert self.expects
        rows = [one.start.row for one in played]
        texts, ids = [one.text for one in played], [one.ids for one in played]
        silent = dict.fromkeys(("log_extra", "log_metric"), lambda name, values: None)
        returned = self.expects(**_columns(rows, _as_trl(rows, texts), ids, state), **silent)
        return expected.continuations(returned, len(played))

    def answer(self, engine: Engine, starts: list[Start], draws: Draws | None = None) -> list[Episode]:
        """Play the episodes with the unperturbed model, as `play`; nothing is judged."""
        made = [Episode(start) for start in starts]
        answer = episodes.answers_of(engine, None, draws)
        with self._played(engine, made, answer, lambda phase: contextlib.nullcontext()):
            return made

    @contextlib.contextmanager
    def _played(
        self, engine: Engine, made: list[Episode], answer: Callable[..., Any], clock: Clock
    ) -> Iterator[Stage]:
        """The episodes at their end, on their stage."""
        with self._stage(made, engine.text) as stage:
            episodes.play(made, stage, answer, self._limits(engine), engine.text.encode, clock)
            yield stage

    def _stage(self, played: list[Episode], text: Encoder) -> contextlib.AbstractContextManager[Stage]:
        if self.environments is None:
            return contextlib.nullcontext(SingleAnswers(played))
        return self.environments.open(played, text)

    def most_tokens(self, text: Encoder) -> int | None:
        """Tokens that a conversation may come to; None: it is a prompt with its answer."""
        if self.environments is None:
            return None
        given = self.environments.limits.tokens
        return min(given, text.positions or given)

    def _limits(self, engine: Engine) -> EpisodeLimits:
        if self.environments is None:
            return EpisodeLimits()
        tokens = self.most_tokens(engine.text) or 0
        return EpisodeLimits(self.environments.limits.turns, tokens, engine.max_new_tokens)

    def _judge_episodes(
        self, played: list[Episode], state: TrainerState | None, more: dict[str, Sequence[Any]]
    ) -> Scores:
        """`more`: further columns for reward functions, such as what they see of the environments."""
        rows = [one.start.row for one in played]
        if self.environments is None:
            return self.judge(rows, [one.text for one in played], [one.ids for one in played], state, **more)
        sound = [i for i, one in enumerate(played) if one.ended != FAILED]
        rewards = np.full(len(played), self.environments.failure_reward)
        logged: dict[str, np.ndarray] = {}
        if sound:
            some = [played[i] for i in sound]
            scored = self._rewards(
                [{**one.start.row, "prompt": one.prompt} for one in some],
                [one.completion for one in some],
                [one.ids for one in some],
                state,
                logged,
                **{name: [values[i] for i in sound] for name, values in more.items()},
            )
            rewards[sound] = np.array([one.reward for one in some]) + np.nan_to_num(scored, nan=0.0)
        spread = {name: np.full(len(played), math.nan) for name in logged}
        for name, values in logged.items():
            spread[name][sound] = values
        return Scores(rewards, spread | episodes.figures(played))

    def score(
        self,
        rows: list[Row],
        completions: list[str],
        ids: list[list[int]] | None = None,
        state: TrainerState | None = None,
    ) -> np.ndarray:
        """A reward per row: float64, shape (rows,); NaN where an answer could not be scored.

        `completions` are the answers' texts, `ids` their tokens.
        """
        return self._rewards(rows, _as_trl(rows, completions), ids, state, {})

    def judge(
        self,
        rows: list[Row],
        completions: list[str],
        ids: list[list[int]] | None = None,
        state: TrainerState | None = None,
        **more: Sequence[Any],
    ) -> Scores:
        """Rewards and metrics, the numbers that the reward function logs itself included."""
        logged: dict[str, np.ndarray] = {}
        rewards = self._rewards(rows, _as_trl(rows, completions), ids, state, logged, **more)
        found = self.metrics(rows, completions) if self.metrics else {}
        return Scores(rewards, logged | {name: np.array(v, dtype=float) for name, v in found.items()})

    def _rewards(self, rows, completions, ids, state, logged: dict[str, np.ndarray], **more) -> np.ndarray:
        rewards = self.reward(
            **_columns(rows, completions, ids, state),
            log_extra=lambda name, values: logged.update(_per_answer(name, values, len(rows))),
            log_metric=lambda name, value: logged.update(_per_answer(name, [value] * len(rows), len(rows))),
            **more,
        )
        return check_rewards(rewards, len(rows), f"the reward function of task {self.name}")


def check_rewards(rewards: Any, answers: int, whose: str) -> np.ndarray:
    """What a reward function returned as float64 (answers,); None and infinities are NaN.

    Raises InputError, which names the function and the first answer in question, if it is not that many
    numbers.
    """
    wanted = f"needed is a list with a number up to {LARGEST:g}, or None, for each of {answers} completions"
    if isinstance(rewards, str | bytes | Mapping | set) or not hasattr(rewards, "__iter__"):
        raise InputError(f"task.reward: {whose} returned {shown(rewards)}; {wanted}")
    values = []
    for number, reward in enumerate(rewards, 1):
        try:
            values.append(math.nan if reward is None else float(_scalar(reward)))
            if abs(values[-1]) > LARGEST and math.isfinite(values[-1]):
                raise OverflowError
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"task.reward: {whose} returned {shown(reward)} for completion {number}; {wanted}"
            ) from None
    if len(values) != answers:
        raise InputError(f"task.reward: {whose} returned {len(values)} rewards; {wanted}")
    return np.array([r if math.isfinite(r) else math.nan for r in values], dtype=np.float64)


def _scalar(value: Any) -> Any:
    """The value, if it can be a single number: a row of a matrix cannot, whatever float() makes of it."""
    if isinstance(value, bytes) or getattr(value, "ndim", False):
        raise TypeError
    return value


def answer_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion as reward functions get it."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def member_reward(rewards: np.ndarray) -> float:
    """A member's reward: the mean over its answers, exactly rounded; NaN if any was not scored."""
    return math.fsum(rewards.tolist()) / len(rewards)


def _as_trl(rows: list[Row], texts: list[str]) -> list[Prompt]:
    """Single answers, each as reward functions get it."""
    pairs = zip(rows, texts, strict=True)
    return [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in pairs
    ]


def _columns(
    rows: list[Row], completions: list[Prompt], ids: list[list[int]] | None, state: TrainerState | None
) -> dict[str, Any]:
    """What the user's functions get of answers, by name.

    Copies, because a function that changed them would change them on its rank only.
    """
    rows = copy.deepcopy(rows)
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": completions,
        "completion_ids": ids,
        "trainer_state": state or TrainerState(),
        **{key: [row[key] for row in rows] for key in rows[0] if key not in NOT_PASSED},
    }


def _per_answer(name: str, values: Sequence[Any], answers: int) -> dict[str, np.ndarray]:
    """What a reward function logs, if it is a number for each answer; else nothing."""
    try:
        made = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        return {}
    return {name: made} if len(made) == answers else {}
