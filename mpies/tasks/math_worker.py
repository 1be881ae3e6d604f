"""Compares mathematical answers, in a process of its own: a line of JSON in, a line out.

math-verify hands what a model wrote to sympy, which may then compute 7^7^9. Its own time limits are
signals by the clock: they reach the main thread only, and only between two steps of the interpreter,
and on a busy node they come too early. So this process limits itself by CPU time: first by a signal,
then by the kernel, which ends the process. Memory is limited, too.
"""

from __future__ import annotations

import json
import logging
import math
import re
import resource
import signal
import sys
from functools import cache

from mpies.signals import SIGNALS, ignore

SECONDS = 3  # of CPU time for one answer, until it counts as wrong
KILL_AFTER = 3  # more of them, where the signal does not get through
MEMORY = 4 * 2**30  # bytes of address space

STOPS = (".", ",", ";", ":")
BLANKS = ("\\,", "\\;", "\\:", "\\!", "\\quad", "\\qquad")

# What stands between groups of three digits, in LaTeX or as Unicode's narrow and unbroken blanks; math-verify
# takes most of it for a product, or a sum. Plain commas, which may also be a list's, it knows itself.
GROUPING = r"(?:\\[,;: ]|,?\\!|\{,\}|\\thinspace(?![A-Za-z])|~|[\u00a0\u2009\u202f])[ ]{0,2}"
GROUPED = re.compile(
    rf"(?<![\d.,])[1-9]\d{{0,2}}(?:{GROUPING}\d{{3}})+(?!\d)|"  # 12\,345
    rf"(?<![\d.,])\d{{1,15}}\.\d{{3}}(?:{GROUPING}\d{{3}}){{0,9}}{GROUPING}\d{{1,3}}(?!\d)"  # 3.141\,59
)
GROUPED_BY_BLANKS = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+")


class _TimeIsUp(BaseException):
    """Not an Exception, all of which math-verify catches."""


def main() -> None:
    # What is meant for the rank; this process ends with its input.
    ignore(SIGNALS)
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (before any limit: it takes a second)

    signal.signal(signal.SIGPROF, _time_is_up)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, MEMORY)
    _answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        _answer(_in_time(right if "text" in request else is_answer, **request))


def right(gold: str, text: str) -> bool:
    """Does the text end in an answer that equals the gold answer?"""
    final = final_answer(text)
    if final is None:  # "It is 36.", but not a \\boxed{ that was begun and not ended
        return "\\boxed{" not in text and _equal(gold, text)
    if _equal(gold, _boxed(final)):
        return True
    return "\\boxed{" not in text and _equal(gold, final)  # "#### 36 euros."


def is_answer(gold: str) -> bool:
    """Can answers be compared with this gold answer? If not, it does not even equal itself."""
    from math_verify import verify

    return verify(_parsed(gold), _parsed(gold), timeout_seconds=None)


def final_answer(text: str) -> str | None:
    """What the last \\boxed{...} holds, or what follows the last ####; None without either."""
    _, found, rest = text.rpartition("\\boxed{")
    if not found:
        return text.rpartition("####")[2].strip() if "####" in text else None
    depth = 1
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return rest[:position].strip()
    return None


def _equal(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    return verify(_parsed(gold), parse(_joined(answer), parsing_timeout=None), timeout_seconds=None)


@cache
def _parsed(gold: str) -> list:
    from math_verify import parse

    return parse(_joined(_boxed(gold)), parsing_timeout=None)


def _joined(text: str) -> str:
    """The text, each number's digits without what groups them by three: 1080 for 1\\,080 and 1{,}080."""

    def join(found: re.Match[str]) -> str:
        mixed = found.string.startswith("/", found.end())  # 2\,125/1000 may be more than 2
        return found[0] if mixed else re.sub(r"[^\d.]", "", found[0])

    return GROUPED.sub(join, text)


def _boxed(answer: str) -> str:
    body = _without_end(answer)
    return f"\\boxed{{{body.replace(' ', '') if GROUPED_BY_BLANKS.fullmatch(body) else body}}}"


def _without_end(answer: str) -> str:
    """The answer without blanks at its end, and without one full stop, comma, colon or semicolon.

    They end a sentence, and math-verify would compare the whole as text. An ellipsis and `2!` say
    something. What else stands beside numbers (`\\$`, `\\%`, units in \\text) math-verify knows itself.
    """
    text = _without_blanks(answer.strip())
    body = text.rstrip("}$")  # "$204.$", "\\text{Evelyn.}"
    shorter, ended = body[:-1], body.endswith(STOPS)
    if ended and not shorter.endswith((".", "\\", "\\right", "\\left")):
        return _without_blanks(shorter) + text[len(body) :]
    return text


def _without_blanks(text: str) -> str:
    """The text without white space and LaTeX's blanks at its end."""
    while True:
        shorter = text.rstrip().rstrip("~")
        blank = next((blank for blank in BLANKS if shorter.endswith(blank)), "")
        # A backslash that is left over was one before a blank; "\\{1, 2\\}" ends otherwise.
        shorter = shorter[: len(shorter) - len(blank)].rstrip("\\")
        if shorter == text:
            return text
        text = shorter


def _in_time(function, **arguments) -> bool:
    """The function's result; False if it takes too long or too much memory."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(spent.ru_utime + spent.ru_stime) + SECONDS + KILL_AFTER
    _limit(resource.RLIMIT_CPU, limit)
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            return bool(function(**arguments))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (_TimeIsUp, MemoryError, RecursionError):
        return False


def _limit(what: int, value: int) -> None:
    """Lower a soft limit, as far as the hard one allows."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _time_is_up(_number, _frame) -> None:
    raise _TimeIsUp


def _answer(value: object) -> None:
    print(json.dumps(value), flush=True)
