"""Conciseness: answer right, in as few characters as possible (paper, section 4.2).

R = -| length of the answer - length of the shortest correct answer |, in characters of the response
alone. The two training prompts and the held-out prompts are the paper's.
"""

from __future__ import annotations

from mpies.tasks.base import Task

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


def reward(prompts, completions: list[str], answer: list[str], **_) -> list[float]:
    """-|len(completion) - len(answer)| for each completion, in characters."""
    return [-float(abs(len(c) - len(a))) for c, a in zip(completions, answer, strict=True)]


def task() -> Task:
    return Task("conciseness", _rows(TRAIN), _rows(HELD_OUT), reward)


def _rows(table: dict[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in table.items()]
