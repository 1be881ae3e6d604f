"""What an answer should have said, and how likely the member found it: a reward without steps.

`task.expects` names the user's function, with the signature of a reward function. Of each answer it says
how much of it is kept, and what is expected to follow. The engine reads both, and reward functions get the
log-probabilities of the expected text's tokens: probabilities as rewards are those of "RLPR" (arXiv
2506.18254, section 2), there after a sampled answer, here after the member's greedy one. Where a right answer
is 1 and a wrong one 0, most pairs of members are told nothing; their probabilities of what is right differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpies.engines.base import Encoder, Engine, Prompt
from mpies.errors import InputError
from mpies.tasks import users_code
from mpies.tasks.environments.contract import shown

SETTING = "task.expects"
COLUMN = "log_probabilities"
"""Under which reward functions get them: of each answer float64 (tokens,), nat, or None."""

Expects = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Continuation:
    """An answer as it should have been: what is kept of it, and what should have followed."""

    kept: str
    text: str


def load(name: str) -> Expects:
    """The function. Raises InputError if there is none, or if it does not take every column."""
    function = users_code.load(name, SETTING)
    users_code.refuse_signature(function, SETTING, name, "as of a reward function")
    return partial(users_code.call, function)


def continuations(returned: Any, answers: int) -> list[Continuation | None]:
    """What the function returned, checked: (kept, expected) or None for each answer. Raises InputError."""
    wanted = f"needed is a list with a pair of texts (kept, expected), or None, for each of {answers} answers"
    if isinstance(returned, str) or not isinstance(returned, Sequence) or len(returned) != answers:
        raise InputError(f"{SETTING}: its function returned {shown(returned)}; {wanted}")
    made: list[Continuation | None] = []
    for number, one in enumerate(returned, 1):
        pair = isinstance(one, list | tuple) and [type(text) for text in one] == [str, str]
        if one is not None and not (pair and one[1]):
            raise InputError(f"{SETTING}: its function returned {shown(one)} for answer {number}; {wanted}")
        made.append(None if one is None else Continuation(*one))
    return made


def read(
    engine: Engine, prompts: list[Prompt], asked: list[Continuation | None], members: list[int] | None
) -> list[np.ndarray | None]:
    """Log-probabilities of each expected text's tokens, after the prompt and what is kept: nat.

    None where nothing is asked, or where the engine has no room for it. `members`: of the block, whose each
    is; None: the unperturbed model's. Raises InputError for a text of which no token would be asked.
    """
    told = {i: _tokens(engine.text, one) for i, one in enumerate(asked) if one is not None}
    most = engine.most_given
    chosen = [
        i
        for i, (tokens, _) in told.items()
        if not most or len(engine.text.encode(prompts[i])) + len(tokens) <= most
    ]
    found = engine.log_probabilities(
        [prompts[i] for i in chosen],
        [told[i][0] for i in chosen],
        members=[members[i] for i in chosen] if members is not None else None,
        after=[told[i][1] for i in chosen],
    )
    made: list[np.ndarray | None] = [None] * len(asked)
    for i, values in zip(chosen, found, strict=True):
        made[i] = values
    return made


def _tokens(text: Encoder, one: Continuation) -> tuple[list[int], int]:
    tokens, kept = text.continue_with(one.kept, one.text)
    if len(tokens) <= kept:  # nothing would be as likely as what is certain
        raise InputError(
            f"{SETTING}: the text {shown(one.text)} after {shown(one.kept[-40:])} has no tokens of its own in"
            " this model's tokenizer"
        )
    return tokens, kept
