"""One prompt's answers through the generations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpies.analyze.run import Run
from mpies.errors import InputError
from mpies.readable import clip


@dataclass(frozen=True)
class Answer:
    generation: int
    """Updates in the weights that answered; 0: the initial model."""
    completion: str
    reward: float
    """NaN: not scored."""


def prompts(run: Run) -> list[tuple[str, str]]:
    """(split, prompt) of all kept answers; held-out prompts first, in the order of the file."""
    table = run.tables["sample"]
    pairs = dict.fromkeys(zip(table["split"], table["prompt"]))
    return sorted(pairs, key=lambda pair: pair[0] != "held_out")


def choose(run: Run, wanted: str | None) -> tuple[str, str]:
    """The (split, prompt) that is meant: by its number in `prompts` from 1, a part of its text, or the first.

    Raises InputError if there is none.
    """
    known = prompts(run)
    if not known:
        raise InputError(f"{run.path}: no answers were kept (run.keep_samples)")
    if wanted is None:
        return known[0]
    if wanted.isascii() and wanted.isdecimal() and 1 <= int(wanted) <= len(known):
        return known[int(wanted) - 1]
    found = [pair for pair in known if wanted.lower() in pair[1].lower()]
    if not found:
        raise InputError(
            f"--prompt: no prompt contains {clip(wanted, 60)!r}; --list shows the {len(known)} there are"
        )
    return found[0]


def answers(run: Run, split: str, prompt: str) -> list[Answer]:
    """The answers to a prompt, by generation."""
    table = run.tables["sample"]
    rows = np.flatnonzero((table["split"] == split) & (table["prompt"] == prompt))
    found = [
        Answer(int(table["generation"][i]), str(table["completion"][i]), float(table["reward"][i]))
        for i in rows
    ]
    return sorted(found, key=lambda answer: answer.generation)
