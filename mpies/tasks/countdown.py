"""Countdown: reach a target with given numbers, each used once (paper, section 4.1).

The reward is the paper's: answer + 0.1 * format. The prompt is raw text that ends inside a think
block. Problems come from a file in the paper's format (`id, context, numbers, target, solution`), or
are made up: solvable, with three or four numbers from 1 to 99.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mpies import config
from mpies.errors import InputError
from mpies.noise.definition import STREAM_PROBLEMS, philox
from mpies.tasks import custom, data
from mpies.tasks.arithmetic import BINARY, value_using
from mpies.tasks.base import Row, Task, answer_text

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
TOLERANCE = Fraction(1, 100_000)
FORMAT_WEIGHT = 0.1

TRAIN_SIZE, EVAL_SIZE = 200, 2000  # made-up problems, as many as the paper has
MOST_MADE = 100_000  # which takes a minute, and hours for more
LARGEST_NUMBER, LARGEST_TARGET = 99, 999
TARGET = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")

PROMPT = """\
Make an expression from the numbers [{numbers}] that equals {target}. Use each number exactly once, and \
nothing but the operations +, -, *, / and parentheses. Write down your reasoning in <think> </think> tags, \
then only the expression in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.
Let me solve this step by step.
<think>"""


def reward(prompts, completions, numbers: list[list[int]], target: list[str], **_) -> list[float]:
    """answer + 0.1 * format of each completion: from 0 to 1.1."""
    problems = zip(completions, numbers, target, strict=True)
    return [
        answer_score(text, given, aim) + FORMAT_WEIGHT * format_score(text)
        for text, given, aim in ((answer_text(c), n, t) for c, n, t in problems)
    ]


def metrics(rows: list[Row], completions: list[str]) -> dict[str, list[float]]:
    """accuracy: the answer's part of the reward; format: the format's part."""
    right = [answer_score(c, r["numbers"], r["target"]) for r, c in zip(rows, completions, strict=True)]
    return {"accuracy": right, "format": [format_score(c) for c in completions]}


def format_score(completion: str) -> float:
    """1 for exactly `<think>...</think>\\n<answer>...</answer>`, the prompt's `<think>` included.

    A line break may follow. Otherwise 0.1 for a think block plus 0.5 for an answer block.
    """
    text = (THINK + completion).removesuffix("\n")
    between = f"{END_THINK}\n{ANSWER}"
    # Not a regular expression, of which some answers would take quadratic time.
    if text.endswith(END_ANSWER) and between in text[len(THINK) : -len(END_ANSWER)]:
        return 1.0
    return 0.1 * (END_THINK in completion) + 0.5 * (last_answer(text) is not None)


def answer_score(completion: str, numbers: list[int], target: str) -> float:
    """1 if the last answer block uses every number once and is less than 1e-5 from the target, else 0.

    White space at the block's ends is none of its expression.
    """
    expression = last_answer(completion)
    value = None if expression is None else value_using(expression.strip(), numbers)
    return float(value is not None and abs(value - Fraction(target)) < TOLERANCE)


def last_answer(text: str) -> str | None:
    """What the last answer block holds; blocks are found from left to right and do not overlap."""
    found, start = None, text.find(ANSWER)
    while start >= 0:
        end = text.find(END_ANSWER, start)
        if end < 0:
            break
        found = text[start + len(ANSWER) : end]
        start = text.find(ANSWER, end)
    return found


def make_task(settings: config.TaskSettings) -> Task:
    """From the files that are set, or made up. Raises InputError for bad data."""
    if settings.train_data:
        train, held_out = data.read_splits(settings, check_row)
        return Task("countdown", train, held_out, reward, metrics)
    for key in ("train_size", "eval_size"):
        size = getattr(settings, key)
        if size > MOST_MADE:
            raise InputError(
                f"task.{key}: given {size}, but countdown makes up to {MOST_MADE} problems; for more, set"
                " task.train_data"
            )
    made = make_problems(settings.seed, settings.numbers)
    # The held-out problems first, so that they stay the same for any number of training problems.
    held_out = [next(made) for _ in range(settings.eval_size or EVAL_SIZE)]
    if settings.eval_data:
        rows = data.read_rows(settings.eval_data, "task.eval_data", check_row, settings.eval_size)
        held_out = data.first("task.eval_size", rows, settings.eval_size, settings.eval_data)
    train = [next(made) for _ in range(settings.train_size or TRAIN_SIZE)]
    return Task("countdown", train, held_out, reward, metrics)


def check_row(given: Row) -> Row:
    """A row of a data file, checked. `context` is the prompt; without it, ours is used.

    Raises InputError with what is wrong.
    """
    numbers, target = given.get("numbers"), given.get("target")
    if not isinstance(numbers, list) or not numbers or not all(_is_natural(n) for n in numbers):
        raise InputError(f"numbers: given {numbers!r:.80}, needed is a list such as [44, 19, 35]")
    if isinstance(target, bool) or not TARGET.fullmatch(str(target)):
        raise InputError(f'target: given {target!r:.80}, needed is a number such as "98" or "24.5"')
    prompt = given.get("context", given.get("prompt")) or prompt_of(numbers, str(target))
    if not isinstance(prompt, str):
        raise InputError(f"context: given {prompt!r:.80}, needed is text")
    known = {"id": given.get("id"), "solution": given.get("solution")}
    return {
        "prompt": custom.check_prompt(prompt, "context"),
        "numbers": numbers,
        "target": str(target),
        **known,
    }


def prompt_of(numbers: list[int], target: str) -> str:
    return PROMPT.format(numbers=" ".join(map(str, numbers)), target=target)


def _is_natural(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def make_problems(seed: int, sizes: Sequence[int]) -> Iterator[Row]:
    """Solvable problems without end, no two alike, `sizes` giving the numbers' count in turn.

    A pure function of seed and sizes: candidate i is made from Philox(key=seed; counter=(.., i, stream
    5)). Targets are whole, from 1 to 999.
    """
    seen: set[tuple[int, ...]] = set()
    candidate = 0
    while True:
        made = None
        while made is None or made.key in seen:
            made = _candidate(seed, candidate, sizes[len(seen) % len(sizes)])
            candidate += 1
        seen.add(made.key)
        yield made.row(len(seen) - 1)


@dataclass(frozen=True)
class _Problem:
    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def key(self) -> tuple[int, ...]:
        return *sorted(self.numbers), self.target

    def row(self, index: int) -> Row:
        numbers, target = list(self.numbers), str(self.target)
        prompt = prompt_of(numbers, target)
        known = {"id": index, "solution": self.solution}
        return {"prompt": prompt, "numbers": numbers, "target": target, **known}


def _candidate(seed: int, index: int, size: int) -> _Problem | None:
    """Random numbers, joined two by two by random operations until one is left: the target."""
    words = iter(philox(seed, np.arange(4), index, STREAM_PROBLEMS).ravel().tolist())

    def draw(below: int) -> int:
        return next(words) % below

    numbers = tuple(1 + draw(LARGEST_NUMBER) for _ in range(size))
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        left, right = parts.pop(draw(len(parts))), parts.pop(draw(len(parts)))
        symbol = "+-*/"[draw(4)]
        if symbol == "/" and right[0] == 0:
            return None
        parts.append((BINARY[symbol](left[0], right[0]), f"({left[1]} {symbol} {right[1]})"))
    target, solution = parts[0]
    if target.denominator != 1 or not 0 < target <= LARGEST_TARGET:
        return None
    return _Problem(numbers, int(target), solution[1:-1])
