"""One prompt's answers through the generations: training's, and those of `mpies.evaluate --log`."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpies.analyze.dialogue import Line, lines_of
from mpies.analyze.evaluations import rows_of
from mpies.analyze.run import Run
from mpies.errors import InputError
from mpies.splits import HELD_OUT
from mpies.text import clip

TABLES = ("sample", "answer")


@dataclass(frozen=True)
class Answer:
    generation: int
    """Updates in the weights that answered; 0: the initial model."""
    completion: str
    reward: float
    """NaN: not scored."""
    sampled: str = ""
    """Which sample at which temperature; empty: greedy."""
    lines: list[Line] = field(default_factory=list)
    """Of an episode's conversation, after its prompt; none: the completion is all there is."""


def answered_prompts(run: Run) -> list[tuple[str, str]]:
    """(split, prompt) of all kept answers; held-out prompts first, in the order of the file."""
    pairs = dict.fromkeys((row["split"], row["prompt"]) for t in TABLES for row in rows_of(run, t))
    return sorted(pairs, key=lambda pair: pair[0] != HELD_OUT)


def choose_prompt(run: Run, wanted: str | None) -> tuple[str, str]:
    """The (split, prompt) that is meant: by its number, from 1, a part of its text, or the first.

    Numbers are those of `answered_prompts`. Raises InputError if there is none.
    """
    known = answered_prompts(run)
    if not known:
        raise InputError(f"{run.path}: no answers were kept (run.keep_samples)")
    if wanted is None:
        return known[0]
    if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10 and 1 <= int(wanted) <= len(known):
        return known[int(wanted) - 1]
    found = [pair for pair in known if wanted.lower() in pair[1].lower()]
    if not found:
        raise InputError(
            f"--prompt: no prompt contains {clip(wanted, 60)!r}; --list shows the {len(known)} there are"
        )
    return found[0]


def answers_to(run: Run, split: str, prompt: str) -> list[Answer]:
    """The answers to a prompt, by generation; greedy ones first, once where they are in both tables."""
    found = [
        Answer(
            row["generation"],
            row["completion"],
            row["reward"],
            _sampled(row),
            lines_of(row.get("messages", "")),
        )
        for table in TABLES
        for row in rows_of(run, table)
        if (row["split"], row["prompt"]) == (split, prompt)
    ]
    once = {(a.generation, a.completion, a.sampled): a for a in reversed(found)}
    return sorted(reversed(once.values()), key=lambda answer: (answer.generation, answer.sampled != ""))


def _sampled(row: dict) -> str:
    if not row.get("temperature"):
        return ""
    return f"sample {row['sample']} at T={row['temperature']:g}, seed {row['seed']}"
