"""Short questions: answer right, and briefly. The quickstart's task.

R = 1 / (1 + extra / 100) for a right answer, else 0, where `extra` is how many characters it has more than
the shortest right one. A right answer is worth more, the briefer it is, and a wrong one nothing, however
brief: unlike the paper's reward for conciseness (section 4.2), this one cannot be had without right answers.

The 200 questions in questions.jsonl were written for mpies, under its licence: every other one is held out.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from mpies import config
from mpies.errors import InputError
from mpies.tasks import custom, data
from mpies.tasks.base import Row, Task, answer_text
from mpies.tasks.conciseness import holds

OWN = Path(__file__).with_name("questions.jsonl")
HALF = 100  # characters beyond the shortest right answer that halve the reward


def reward(prompts, completions, answer: list[list[str]], **_) -> list[float]:
    """1 / (1 + extra / 100) for each completion that holds one of its `answer` texts, else 0."""
    scores = []
    for completion, known in zip(completions, answer, strict=True):
        text = answer_text(completion).strip()
        extra = max(0, len(text) - min(map(len, known)))
        scores.append(is_right(text, known) / (1 + extra / HALF))
    return scores


def is_right(text: str, known: list[str]) -> bool:
    return any(holds(text, answer) for answer in known)


def metrics(rows: list[Row], completions: list[str]) -> dict[str, list[float]]:
    """accuracy: 1 if a right answer is in the completion; characters: its length."""
    return {
        "accuracy": [
            float(is_right(text, row["answer"])) for row, text in zip(rows, completions, strict=True)
        ],
        "characters": [float(len(text.strip())) for text in completions],
    }


def make_task(settings: config.TaskSettings) -> Task:
    """The task's own questions, or the files that are set, with a column `answer`. Raises InputError."""
    check = partial(check_row, column=settings.prompt_column)
    if settings.train_data:
        return Task("questions", *data.read_splits(settings, check), reward, metrics)
    rows = [json.loads(line) for line in OWN.read_text().splitlines()]
    return Task("questions", *data.first_of_each(settings, rows[::2], rows[1::2]), reward, metrics)


def check_row(given: Row, column: str) -> Row:
    """A row with `answer` as a list of right answers. Raises InputError with what is wrong."""
    answer = given.get("answer")
    answer = [answer] if isinstance(answer, str) else answer
    if (
        not isinstance(answer, list)
        or not answer
        or not all(isinstance(a, str) and a.strip() for a in answer)
    ):
        raise InputError(
            f"answer: given {given.get('answer')!r:.40}, needed is a right answer, or a list of them"
        )
    return custom.check_row({**given, "answer": answer}, column)
