"""The reward of char_count, for mpies and TRL's GRPOTrainer: 1 if the last box holds the count, else 0.

Beside it, for mpies alone (task.expects), how likely a member finds the count in its last box, or in that of
the worked answer.
"""

import math
import re

OPEN = r"\boxed{"
BOX = re.compile(r"\\boxed\{\s*(\d{1,9})\s*\}")


def right(completions, answer, log_extra=None, **columns):
    """1 for each completion whose last `\\boxed{...}` holds `answer`, else 0."""
    found = [BOX.findall(completion[0]["content"]) for completion in completions]
    hits = [float(bool(boxes) and int(boxes[-1]) == known) for boxes, known in zip(found, answer)]
    if log_extra is not None:
        log_extra("accuracy", hits)
        log_extra("format", [float(bool(boxes)) for boxes in found])
    return hits


def boxed(completions, **columns):
    """1 for each completion with a box that holds a number, right or not: what a format term would reward."""
    return [float(bool(BOX.search(completion[0]["content"]))) for completion in completions]


def right_box(completions, answer, **columns):
    """Of each completion: what it says up to its last box, and what that should have held."""
    texts = [completion[0]["content"] for completion in completions]
    kept = [text[: text.rindex(OPEN)] if OPEN in text else f"{text}\n" for text in texts]
    return [(before + OPEN, f"{known}}}") for before, known in zip(kept, answer)]


def likely(completions, answer, log_probabilities, log_extra, **columns):
    """The probability of the right count in the box, after what the member itself wrote; logs `right` too."""
    right(completions, answer, log_extra)
    return known(log_probabilities)


def worked(completions, solution, **columns):
    """For each, whatever it says: the worked answer up to its box, and what that holds."""
    boxes = [text.rindex(OPEN) + len(OPEN) for text in solution]
    return [(text[:box], text[box:]) for text, box in zip(solution, boxes)]


def known(log_probabilities, **columns):
    """The probability of what was expected."""
    return [0.0 if tokens is None else math.exp(sum(tokens)) for tokens in log_probabilities]
