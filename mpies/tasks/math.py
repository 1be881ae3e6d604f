"""Mathematics with a final answer that can be checked: 1 if it is right, else 0 (paper, section 4.4).

Rows as in GSM8K (`question`, `answer` with the final answer after ####) or MATH (`problem`, `solution`
with it in \\boxed{}), or `prompt` and `answer`. A list of answers holds alternatives: any of them is
right. math-verify compares them, in a process of its own (see math_worker.py). An answer that it cannot
compare in time counts as wrong.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import reprlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

from mpies import config
from mpies.errors import InputError
from mpies.tasks import custom, data
from mpies.tasks.base import Row, Task, answer_text
from mpies.tasks.math_worker import final_answer
from mpies.tasks.processes import HelperProcess

SAMPLE = Path(__file__).with_name("math_sample.jsonl")
SAMPLE_TRAIN_SIZE = 20

INSTRUCTION = "\n\nReason step by step, and put the final answer in \\boxed{}."

# Seconds that the worker may take for an answer by the clock. It limits itself by CPU time: this is
# for a machine that stands still.
PATIENCE = 120

# Golds that math-verify is known to parse: most of those in GSM8K and MATH.
PLAIN = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?|-?\\frac\{[0-9]{1,15}\}\{[0-9]{1,15}\}")

# Starting a checker takes as long as parsing so many golds.
GOLDS_A_CHECKER = 100
CHECKERS = 4

Gold = str | list[str]


def reward(prompts, completions, answer: list[Gold], **_) -> list[float | None]:
    """1 for a right final answer, else 0; None if the machine failed to compare it."""
    return [_score(answer_text(c), gold) for c, gold in zip(completions, answer, strict=True)]


def metrics(rows: list[Row], completions: list[str]) -> dict[str, list[float]]:
    """accuracy: the reward; boxed: 1 if there is an answer in \\boxed{}."""
    scores = reward(None, completions, [row["answer"] for row in rows])
    return {
        "accuracy": [float("nan") if s is None else s for s in scores],
        "boxed": [float("\\boxed" in c) for c in completions],
    }


def make_task(settings: config.TaskSettings) -> Task:
    """From the files that are set, or a small sample of our own. Raises InputError."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("task.name: math needs math-verify: pip install 'mpies[math]'")

    check = partial(check_row, prompt_column=settings.prompt_column)
    if settings.train_data:
        return Task("math", *data.read_splits(settings, check, find_incomparable), reward, metrics)
    rows = data.read_rows(str(SAMPLE), "task.train_data", check)
    train, held_out = rows[:SAMPLE_TRAIN_SIZE], rows[SAMPLE_TRAIN_SIZE:]
    return Task("math", *data.first_of_each(settings, train, held_out), reward, metrics)


def check_row(given: Row, prompt_column: str) -> Row:
    """A row of any of the three kinds as prompt and gold answer. Raises InputError with what is wrong."""
    column = next((c for c in (prompt_column, "question", "problem") if c in given), prompt_column)
    kept = custom.check_row(given, column)
    if column != prompt_column and isinstance(kept["prompt"], str):
        kept["prompt"] += INSTRUCTION
    gold = _gold(given)
    if not gold:
        raise InputError(
            "no final answer; needed is a column `answer`, with it alone or after ####, or `solution`, with"
            " it in \\boxed{}"
        )
    return {**kept, "answer": gold}


def find_incomparable(rows: list[Row]) -> tuple[int, str] | None:
    """The first row with a gold answer that nothing can be compared with, and what to say of it.

    Parsing takes milliseconds, which sum up: each gold is parsed once, by several checkers at a time.
    """
    places: dict[str, int] = {}
    for number, row in enumerate(rows):
        for gold in _alternatives(row["answer"]):
            if not PLAIN.fullmatch(gold):
                places.setdefault(gold, number)
    good = _are_answers(list(places))
    for gold, number in places.items():
        if not good[gold]:
            return number, (
                f"answer: {gold!r:.60} cannot be compared, not even with itself; write it as LaTeX, such as"
                " \\frac{1}{2}, or leave the row out"
            )
    return None


def _are_answers(golds: list[str]) -> dict[str, bool]:
    """Of each gold answer: can answers be compared with it?"""
    size = max(1, min(CHECKERS, _cores(), len(golds) // GOLDS_A_CHECKER))
    checkers = [_checker, *(_Checker() for _ in range(size - 1))]
    try:
        with ThreadPoolExecutor(size) as pool:
            shares = [golds[first::size] for first in range(size)]
            made = pool.map(lambda c, share: {gold: c.ask(gold=gold) for gold in share}, checkers, shares)
            return {gold: good for share in made for gold, good in share.items()}
    finally:
        for checker in checkers[1:]:
            checker.stop()


def _cores() -> int:
    """Cores that this rank may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _gold(given: Row) -> Gold | None:
    """What `answer` gives, each of a list; without one, what `solution` ends in."""
    answer = given.get("answer")
    if answer is None:
        solution = given.get("solution", "")
        return final_answer(solution) if isinstance(solution, str) else None
    if not isinstance(answer, list):
        return _one_gold(answer)
    if not answer:
        raise InputError("answer: given [], needed is at least one of the right answers")
    golds = [_one_gold(item) for item in answer]
    if not all(golds):
        raise InputError(f"answer: given {reprlib.repr(answer)}, of which one is empty")
    return [gold for gold in golds if gold]


def _one_gold(given: object) -> str | None:
    if not isinstance(given, str | int | float) or given != given or given in (float("inf"), -float("inf")):
        raise InputError(
            f"answer: given {reprlib.repr(given)}, needed is text or a number, or a list of those of which"
            " any is right"
        )
    text = str(given)
    return final_answer(text) or text.strip() or None


def _alternatives(gold: Gold) -> list[str]:
    return gold if isinstance(gold, list) else [gold]


def _score(text: str, gold: Gold) -> float | None:
    """1 if the text's answer is one of the alternatives, else 0; None if one could not be compared."""
    unknown = False
    for alternative in _alternatives(gold):
        try:
            if _compared(text, alternative):
                return 1.0
        except _WorkerFailedError:
            unknown = True
    return None if unknown else 0.0


@lru_cache(maxsize=10_000)
def _compared(text: str, gold: str) -> float:
    """Members often give the same answer as their neighbours."""
    return float(_checker.ask(gold=gold, text=text))


class _WorkerFailedError(Exception):
    pass


class _Checker:
    """Asks the worker, which is started when it is needed first, and again when an answer was its end."""

    def __init__(self) -> None:
        self._worker: HelperProcess | None = None
        self._lock = threading.Lock()

    def ask(self, **request: str) -> bool:
        """What the worker says; False if it used up its CPU time. Raises _WorkerFailedError."""
        with self._lock:
            try:
                return self._asked(request)
            except _WorkerFailedError:
                return self._asked(request)  # by a new one: the machine's fault, perhaps

    def _asked(self, request: dict[str, str]) -> bool:
        worker = self._worker or self._start()
        worker.tell(json.dumps(request).encode() + b"\n", PATIENCE)
        line = worker.line(PATIENCE)
        if line:
            return json.loads(line)
        if self.stop() == -signal.SIGXCPU:
            return False
        raise _WorkerFailedError

    def _start(self) -> HelperProcess:
        self._worker = HelperProcess("mpies.tasks.math_worker:main")
        if not self._worker.line(PATIENCE):
            raise RuntimeError(f"the process that checks answers did not start (status {self.stop()})")
        return self._worker

    def stop(self) -> int | None:
        """End the worker, if there is one; its exit status."""
        worker, self._worker = self._worker, None
        return worker.end() if worker else None


_checker = _Checker()
atexit.register(_checker.stop)
