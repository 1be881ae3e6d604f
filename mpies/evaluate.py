"""Evaluating the model as it is live on a task's rows, spread over the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpies import parallel
from mpies.engines.base import Engine, prompt_text
from mpies.tasks.base import Row, Task

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Evaluation:
    """Answers and rewards (float64, NaN: not scored) of a list of rows, in its order."""

    rows: list[Row]
    completions: list[str]
    rewards: np.ndarray
    tokens: int

    @property
    def reward_mean(self) -> float:
        scored = [r for r in self.rewards.tolist() if math.isfinite(r)]
        return math.fsum(scored) / len(scored) if scored else math.nan

    def table_rows(self, generation: int, split: str, keep: int):
        """The run file's evaluation row, and sample rows for the first `keep` answers."""
        where = {"generation": generation, "split": split}
        row = {"reward_mean": self.reward_mean, "tokens": self.tokens}
        unmeasured = dict.fromkeys(("accuracy", "kl", "drift_l2"), math.nan)
        samples = [
            {**where, "prompt": prompt_text(r["prompt"]), "completion": c, "reward": reward}
            for r, c, reward in zip(self.rows, self.completions, self.rewards, strict=True)
        ]
        return {**where, **row, **unmeasured}, samples[:keep]


def evaluate(comm: Comm, engine: Engine, task: Task, rows: list[Row], batch_size: int) -> Evaluation:
    """Greedy answers to the rows and their rewards, the same on every rank.

    Ranks take whole batches, so that answers do not depend on the number of ranks.
    """
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    mine = [_evaluate_batch(engine, task, batch) for batch in batches[comm.rank :: comm.size]]
    parallel.barrier(comm)
    everyone = parallel.allgather_objects(comm, mine)
    ordered = [everyone[b % comm.size][b // comm.size] for b in range(len(batches))]
    return Evaluation(
        rows=rows,
        completions=[text for texts, _, _ in ordered for text in texts],
        rewards=np.array([reward for _, rewards, _ in ordered for reward in rewards]),
        tokens=sum(tokens for _, _, tokens in ordered),
    )


def _evaluate_batch(engine: Engine, task: Task, rows: list[Row]):
    answers = engine.generate([row["prompt"] for row in rows])
    return answers.texts, task.score(rows, answers.texts).tolist(), sum(answers.tokens)
