"""Evaluating the model as it is live on a task's rows, spread over the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mpies import parallel
from mpies.engines.base import Engine, prompt_text
from mpies.tasks.base import Row, Scores, Task, TrainerState

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Evaluation:
    """Answers, rewards and metrics (float64, NaN: not scored) of a list of rows, in its order."""

    rows: list[Row]
    completions: list[str]
    rewards: np.ndarray
    tokens: int
    metrics: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def reward_mean(self) -> float:
        return _mean(self.rewards)

    def table_rows(self, generation: int, split: str, keep: int):
        """The run file's evaluation row, sample rows for the first `keep` answers, and metric rows."""
        where = {"generation": generation, "split": split}
        means = {name: _mean(values) for name, values in self.metrics.items()}
        row = {
            "reward_mean": self.reward_mean,
            "accuracy": means.pop("accuracy", math.nan),
            "tokens": self.tokens,
            "answer_tokens": self.tokens / len(self.rows),
        }
        unmeasured = dict.fromkeys(("kl", "drift_l2"), math.nan)
        samples = [
            {**where, "prompt": prompt_text(r["prompt"]), "completion": c, "reward": reward}
            for r, c, reward in zip(self.rows, self.completions, self.rewards, strict=True)
        ]
        metrics = [{**where, "name": name, "mean": mean} for name, mean in means.items()]
        return {**where, **row, **unmeasured}, samples[:keep], metrics


def evaluate(
    comm: Comm,
    engine: Engine,
    task: Task,
    rows: list[Row],
    batch_size: int,
    state: TrainerState | None = None,
) -> Evaluation:
    """Greedy answers to the rows, their rewards and metrics, the same on every rank.

    Ranks take whole batches, so that answers do not depend on the number of ranks.
    """
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    mine = [_evaluate_batch(engine, task, batch, state) for batch in batches[comm.rank :: comm.size]]
    parallel.barrier(comm)
    everyone = parallel.allgather_objects(comm, mine)
    ordered = [everyone[b % comm.size][b // comm.size] for b in range(len(batches))]
    return Evaluation(
        rows=rows,
        completions=[text for texts, _, _ in ordered for text in texts],
        rewards=_joined([scores.rewards for _, scores, _ in ordered]),
        tokens=sum(tokens for _, _, tokens in ordered),
        metrics=_joined_metrics([scores for _, scores, _ in ordered]),
    )


def _evaluate_batch(engine: Engine, task: Task, rows: list[Row], state: TrainerState | None):
    answers = engine.generate([row["prompt"] for row in rows])
    return answers.texts, task.judge(rows, answers.texts, answers.ids, state), sum(answers.tokens)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def _joined_metrics(scores: list[Scores]) -> dict[str, np.ndarray]:
    """The batches' metrics; NaN where a batch does not have one."""
    names = dict.fromkeys(name for batch in scores for name in batch.metrics)
    return {
        name: _joined([batch.metrics.get(name, np.full(batch.rewards.size, np.nan)) for batch in scores])
        for name in names
    }


def _mean(values: np.ndarray) -> float:
    """The mean of the numbers among the values; NaN if there are none."""
    finite = [value for value in values.tolist() if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
