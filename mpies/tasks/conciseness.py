"""Conciseness: answer right, in as few characters as possible (paper, section 4.2).

R = -| length of the answer - length of the shortest correct answer |, in characters of the response
alone. The two training prompts and the held-out prompts are the paper's.

The reward does not ask whether an answer is right: an empty one gets -1 or -2. So evaluations also
give the share of answers that hold the shortest correct answer, by which one sees the reward hacked.
"""

from __future__ import annotations

import re

from mpies import config
from mpies.errors import InputError
from mpies.tasks import custom, data
from mpies.tasks.base import Row, Task, answer_text

TRAIN = {
    "Solve: 3 + 5 =": "8",
    "If all birds can fly and penguins are birds, can penguins fly?": "No",
}
HELD_OUT = {
    "What is the capital of France?": "Paris",
    "Calculate: 12 x 7 =": "84",
    "Is the statement 'All cats are mammals' true or false?": "True",
    "What comes next in the sequence: 2, 4, 6, 8, ?": "10",
    "Translate 'Hello' to Spanish:": "Hola",
    "What is 15% of 200?": "30",
    "Name one primary color:": "Red",
    "How many days are in a week?": "7",
}

WORST = -2000  # the reward that the paper normalises to 0


def reward(prompts, completions, answer: list[str], **_) -> list[float]:
    """-|len(completion) - len(answer)| for each completion, in characters."""
    pairs = zip(completions, answer, strict=True)
    return [-float(abs(len(answer_text(c)) - len(a))) for c, a in pairs]


def metrics(rows: list[Row], completions: list[str]) -> dict[str, list[float]]:
    """accuracy: 1 if the shortest answer is in the completion; normalised: the paper's score, 1 at best."""
    answers = [row["answer"] for row in rows]
    return {
        "accuracy": [float(holds(c, a)) for c, a in zip(completions, answers, strict=True)],
        "normalised": [1 - r / WORST for r in reward(None, completions, answers)],
    }


def holds(completion: str, answer: str) -> bool:
    """Is the answer in the completion, as a word or number of its own, in whatever case?

    "No" is not in "I know not", nor 8 in "18" or "0.8".
    """
    alone = rf"(?<![\w])(?<!\d[.,]){re.escape(answer)}(?!\w)(?![.,]\d)"
    return re.search(alone, completion, re.IGNORECASE) is not None


def make_task(settings: config.TaskSettings) -> Task:
    """The paper's prompts, or the files that are set, with a column `answer`. Raises InputError."""
    if not settings.train_data:
        own = data.first_of_each(settings, _rows(TRAIN), _rows(HELD_OUT))
        return Task("conciseness", *own, reward, metrics)

    def check_row(given: Row) -> Row:
        answer = given.get("answer")
        if not isinstance(answer, str) or not answer:
            raise InputError(f"answer: given {answer!r:.40}, needed is the shortest right answer")
        return custom.check_row(given, settings.prompt_column)

    return Task("conciseness", *data.read_splits(settings, check_row), reward, metrics)


def _rows(table: dict[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in table.items()]
