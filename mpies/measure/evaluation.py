"""Answers of the model as it is live to a task's rows, with rewards and metrics, spread over the ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpies.engines.base import Draws, Engine, Prompt, prompt_text
from mpies.measure.statistics import mean
from mpies.ranks.collectives import allgather_objects, barrier
from mpies.splits import HELD_OUT
from mpies.tasks import transcript
from mpies.tasks.base import Played, Row, Scores, Task, TrainerState
from mpies.tasks.episodes import Episode
from mpies.time_limit import OutOfTimeError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

# Is there time for so many more batches, of which the longest so far took so many seconds?
HasTime = Callable[[float, int], bool]


def always(seconds: float, batches: int) -> bool:
    """Where no time limit is."""
    return True


# A row, or whatever stands for one.
Asked = TypeVar("Asked")

# Random numbers belong to numbered prompts: training prompts count from 0, held-out ones from here.
FIRST_HELD_OUT = 2**31


def first_of(split: str) -> int:
    """The number of a split's first prompt."""
    return FIRST_HELD_OUT if split == HELD_OUT else 0


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: `samples` for each prompt, with probability softmax(logits / temperature)."""

    samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    first: int = 0
    """The number of the first prompt; see engines/sampler.py."""

    @classmethod
    def of(cls, split: str, samples: int, seed: int) -> Sampling:
        """Of a split's prompts, by the model's own probabilities."""
        return cls(samples, 1.0, seed, first_of(split))

    def draws(self, prompts: int) -> Draws:
        """For every prompt's samples, one prompt after another."""
        from mpies.engines.sampler import answer_numbers

        numbers = answer_numbers(self.first + np.arange(prompts), self.samples)
        return Draws(self.seed, self.temperature, numbers)


@dataclass(frozen=True)
class Evaluation:
    """What a list of rows was answered, `samples` answers to each, one row's after another's.

    rewards and metrics: float64 (answers,), NaN where not scored; tokens: int64 (answers,).
    """

    rows: list[Row]
    samples: int
    completions: list[str]
    rewards: np.ndarray
    tokens: np.ndarray
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    mine: list[list[Episode]] = field(default_factory=list)
    """What this rank has made, batch by batch."""
    conversations: list[Conversation] = field(default_factory=list)
    """Of each answer's episode; none where the task has no environment."""

    @property
    def reward_mean(self) -> float:
        return mean(self.rewards)

    def by_prompt(self, values: np.ndarray) -> np.ndarray:
        """Values of the answers (answers,) as (rows, samples)."""
        return values.reshape(len(self.rows), self.samples)

    def table_rows(
        self,
        generation: int,
        split: str,
        keep: int,
        kl: float = math.nan,
        drift: dict[str, float] | None = None,
    ):
        """The run file's evaluation row, sample rows for the first `keep` prompts, and metric rows.

        `kl` is the divergence from the initial model, `drift` the distances of drift.py.
        """
        drift = drift or {}
        where = {"generation": generation, "split": split}
        means = {name: mean(values) for name, values in self.metrics.items()}
        row = {
            "reward_mean": self.reward_mean,
            "accuracy": means.pop("accuracy", math.nan),
            "kl": kl,
            "tokens": int(self.tokens.sum()),
            "drift_l2": drift.get("all", math.nan),
            "answer_tokens": mean(self.tokens),
        }
        means |= {f"drift_l2 {group}": value for group, value in drift.items() if group != "all"}
        samples = [{**where, **answer} for answer in self.answers(keep)]
        metrics = [{**where, "name": name, "mean": value} for name, value in means.items()]
        return {**where, **row}, samples, metrics

    def prompt_rows(self, generation: int, split: str) -> dict[str, np.ndarray]:
        """The run file's rows for every prompt, by column: of greedy answers, one to each."""
        prompts = len(self.rows)
        return {
            "generation": np.full(prompts, generation),
            "split": np.full(prompts, split, dtype=object),
            "number": np.arange(prompts),
            "reward": self.rewards,
            "accuracy": self.metrics.get("accuracy", np.full(prompts, math.nan)),
            "tokens": self.tokens,
        }

    def answers(self, keep: int) -> list[dict[str, Any]]:
        """Prompt, number of the sample, completion, tokens, reward of the first `keep` prompts' answers."""
        return [
            {
                "prompt": self._prompt(i),
                "sample": i % self.samples,
                "completion": self.completions[i],
                "messages": self.conversations[i].told if self.conversations else "",
                "tokens": int(self.tokens[i]),
                "reward": float(self.rewards[i]),
            }
            for i in range(min(keep, len(self.rows)) * self.samples)
        ]

    def _prompt(self, answer: int) -> str:
        if self.conversations:
            return prompt_text(self.conversations[answer].prompt)
        return prompt_text(self.rows[answer // self.samples]["prompt"])


@dataclass(frozen=True)
class Conversation:
    """An episode's prompt and all that was said in it, as JSON."""

    prompt: Prompt
    told: str

    @classmethod
    def of(cls, episode: Episode) -> Conversation:
        return cls(episode.prompt, transcript.written(episode))


def evaluate_rows(
    comm: Comm,
    engine: Engine,
    task: Task,
    rows: list[Row],
    batch_size: int,
    state: TrainerState | None = None,
    sampling: Sampling | None = None,
    has_time: HasTime = always,
    first: int = 0,
) -> Evaluation:
    """Answers to the rows, greedy or sampled, their rewards and metrics, the same on every rank. Collective.

    Ranks take whole batches, so that answers do not depend on the number of ranks. Before each,
    `has_time` is asked. Raises OutOfTimeError on all ranks if it denied any rank a batch. `first`: the number
    of the first row.
    """
    mine, results, longest = [], [], 0.0
    batches = share(comm, list(enumerate(rows, first)), batch_size, sampling)
    for done, (batch, draws) in enumerate(batches):
        if not has_time(longest, len(batches) - done):
            break
        begun = time.perf_counter()
        starts = task.evaluated_starts([row for _, row in batch], [number for number, _ in batch])
        (played,) = task.play(engine, starts, draws=draws, state=state)
        mine.append(played.episodes)
        results.append(_result(played, task.environments is not None))
        longest = max(longest, time.perf_counter() - begun)
    if barrier(comm, word=len(mine) < len(batches)):
        raise OutOfTimeError
    ordered = rejoin(allgather_objects(comm, results))
    return Evaluation(
        rows=rows,
        samples=sampling.samples if sampling else 1,
        completions=[text for one in ordered for text in one.texts],
        rewards=_joined([one.scores.rewards for one in ordered]),
        tokens=np.array([n for one in ordered for n in one.tokens], dtype=np.int64),
        metrics=_joined_metrics([one.scores for one in ordered]),
        mine=mine,
        conversations=[conversation for one in ordered for conversation in one.conversations],
    )


@dataclass(frozen=True)
class BatchResult:
    """What ranks tell one another of a batch."""

    texts: list[str]
    tokens: list[int]
    scores: Scores
    conversations: list[Conversation]


def _result(played: Played, in_environments: bool) -> BatchResult:
    made = played.episodes
    if not in_environments:
        return BatchResult([one.text for one in made], [one.tokens for one in made], played.scores, [])
    texts = [transcript.readable(one) for one in made]
    return BatchResult(texts, [one.tokens for one in made], played.scores, list(map(Conversation.of, made)))


def parts(
    rows: list[Asked], batch_size: int, sampling: Sampling | None
) -> list[tuple[list[Asked], Draws | None]]:
    """Batches of `batch_size` answers: a row for each, and their random numbers if they are sampled."""
    draws = sampling.draws(len(rows)) if sampling else None
    asked = [row for row in rows for _ in range(sampling.samples)] if sampling else rows
    cuts = [slice(i, i + batch_size) for i in range(0, len(asked), batch_size)]
    return [(asked[cut], draws.part(cut) if draws else None) for cut in cuts]


def share(
    comm: Comm, rows: list[Asked], batch_size: int, sampling: Sampling | None
) -> list[tuple[list[Asked], Draws | None]]:
    """The batches that this rank answers: every (number of ranks)-th."""
    return parts(rows, batch_size, sampling)[comm.rank :: comm.size]


def rejoin(everyone: list[list[Any]]) -> list[Any]:
    """In order again what ranks have made of their shares."""
    ranks, batches = len(everyone), sum(map(len, everyone))
    return [everyone[b % ranks][b // ranks] for b in range(batches)]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def _joined_metrics(scores: list[Scores]) -> dict[str, np.ndarray]:
    """The batches' metrics; NaN where a batch does not have one."""
    names = dict.fromkeys(name for batch in scores for name in batch.metrics)
    return {
        name: _joined([batch.metrics.get(name, np.full(batch.rewards.size, np.nan)) for batch in scores])
        for name in names
    }
