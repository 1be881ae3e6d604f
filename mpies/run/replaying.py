"""From a run file's rows to the weights of any of its generations: every update made again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mpies.errors import InputError
from mpies.runfile import History
from mpies.text import clip

if TYPE_CHECKING:
    import torch

    from mpies.model.anchor import Anchor
    from mpies.model.weights import Weights


def replay(
    weights: Weights,
    history: History,
    first: int,
    last: int,
    *,
    anchor: Anchor | None = None,
    every_digest: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> list[int]:
    """Apply the updates of generations [first, last) to the base, tensor by tensor.

    Returns the digest after the last of them, or with `every_digest` after each. `progress` is
    called with the share of the work that each step was. Raises ValueError without an `anchor` if
    `needs_anchor` says that there has to be one.
    """
    if anchor is None and needs_anchor(history, first, last):
        raise ValueError(
            "these generations decayed towards the initial weights: replaying them needs an anchor"
        )
    steps = [(*history.directions(g), float(history.anchor_decay[g])) for g in range(first, last)]
    parts: list[list[torch.Tensor]] = [[] for _ in (steps if every_digest else [None])]
    for name, base in weights.base.items():
        initial = anchor.initial(name) if anchor else None
        for i, (seeds, coefficients, decay) in enumerate(steps):
            pull = partial(_pull, initial, decay) if decay and initial is not None else None
            weights.update_one(name, seeds, coefficients, pull)
            if every_digest:
                parts[i].append(weights.digest_of(name, weights.value(name)))
            progress(base.numel() / weights.size / len(steps))
        if not every_digest:
            parts[0].append(weights.digest_of(name, weights.value(name)))
    return [weights.whole_digest(part) for part in parts]


def _pull(initial: torch.Tensor, decay: float, name: str, value: torch.Tensor) -> None:
    from mpies.model.anchor import pull_towards

    pull_towards(initial.clone(), value, decay)


def needs_anchor(history: History, first: int, last: int) -> bool:
    """Did any of the generations [first, last) decay towards the initial weights?"""
    return bool(history.anchor_decay[first:last].any())


def which_generation(text: str | None, history: History) -> int:
    """The generation that --generation means: a number, last, or best (by held-out reward); None: last."""
    if text is None or text == "last":
        return history.generations
    if text == "best":
        if not history.held_out:
            raise InputError("--generation best: the run file holds no evaluation on held-out prompts")
        return max(history.held_out, key=history.held_out.__getitem__)
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) > history.generations:
        raise InputError(
            f"--generation: given {clip(text, 40)}, allowed is 0 to {history.generations}, last or best"
        )
    return int(text)
