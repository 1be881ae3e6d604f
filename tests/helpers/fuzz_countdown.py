"""Hostile answers for the Countdown reward: made by the million, each timed.

    python tests/helpers/fuzz_countdown.py --answers 1000000

Prints the slowest answer and fails if an answer crashes the reward, if a score is none of those that
exist, or if Python's own parser disagrees on an expression that is short enough to ask it.
"""

from __future__ import annotations

import argparse
import ast
import operator
import random
import sys
import time
from collections.abc import Callable
from fractions import Fraction

from mpies.tasks.arithmetic import value_using
from mpies.tasks.countdown import reward

NUMBERS, TARGET = [44, 19, 35], "60"
ANSWERS = [0.1 * f + a for a in (0, 1) for f in (0, 0.1, 0.5, 0.6, 1)]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "</think>\n<answer>", "<answer", "answer>", "</", "<"]
PIECES = [
    *TAGS,
    *"0123456789+-*/() ",
    *("44", "19", "35", "**", "//", "44-19+35", "()", "\n", "\t", "\0", ".", ",", "_", "=", "e", "j", "0x"),
    *("４４", "٤", "²", "½", "Ⅷ", "\u200b", "\u202e", "é", "💥", "\ud800", "−", "×", "÷", "（"),
    *("9**9**9", "44/0", "1e999", "__import__('os').system('true')", "lambda:0", "'" * 9, "#", "\\", "%s"),
]


def pieces(random: random.Random) -> str:
    return "".join(random.choices(PIECES, k=random.randrange(40)))


def characters(random: random.Random) -> str:
    return "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(60)))


def expression(random: random.Random) -> str:
    """Nearly right: the numbers in some order between random signs."""
    parts = [str(n) for n in random.sample(NUMBERS, 3)]
    noise = lambda: "".join(random.choices("+-*/() ", k=random.randrange(4)))  # noqa: E731
    return noise() + "".join(part + noise() for part in parts)


def answer(random: random.Random) -> str:
    return f"so</think>\n<answer>{expression(random)}</answer>"


def repeated(random: random.Random) -> str:
    """One piece, thousands of times, inside or outside of an answer block."""
    text = random.choice(PIECES) * random.randrange(1, 3000)
    return (
        f"<answer>{text}44-19+35{random.choice([text, ')' * 3000])}</answer>"
        if random.random() < 0.7
        else text
    )


KINDS: list[Callable[[random.Random], str]] = [pieces, characters, answer, answer, repeated]
WEIGHTS = [30, 10, 30, 29, 1]


def megabytes() -> dict[str, str]:
    """The worst that one can think of, a megabyte and more of each."""
    n = 10**6
    deep = "(" * (n // 2) + "44-19+35" + ")" * (n // 2)
    return {
        "nested parentheses": f"<answer>{deep}</answer>",
        "open parentheses": f"<answer>{'(' * n}44-19+35</answer>",
        "signs": f"<answer>{'-' * n}44-19+35</answer>",
        "spaces": f"<answer>{' ' * n}44-19+35</answer>",
        "digits": f"<answer>{'9' * n}</answer>",
        "zeros": f"<answer>{'0' * n}44-19+35</answer>",
        "numbers": f"<answer>{'44 ' * (n // 3)}</answer>",
        "sum": f"<answer>{'44+' * (n // 3)}44</answer>",
        "powers": f"<answer>{'9**' * (n // 3)}9</answer>",
        "quotients": f"<answer>{'44/' * (n // 3)}44</answer>",
        "answers": "<answer>44-19+35</answer>" * (n // 25),
        "begun answers": "<answer>" * (n // 8),
        "ended answers": "</answer>" * (n // 9),
        "begun and ended": "<answer>" * (n // 16) + "</answer>" * (n // 18),
        "thoughts": "<think></think>\n<answer>" * (n // 24),
        "half tags": "<answer" * (n // 7),
        "digits of another script": f"<answer>{'４' * n}</answer>",
        "emoji": "💥" * n,
    }


def oracle(text: str) -> Fraction | None:
    """The value that Python gives an expression, as a fraction; None if it is none of the game's."""
    try:
        tree = ast.parse(text.strip(" "), mode="eval").body
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return _evaluated(tree) if sorted(constants) == sorted(NUMBERS) else None
    except (SyntaxError, ZeroDivisionError, KeyError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    signs = {ast.UAdd: operator.pos, ast.USub: operator.neg}
    operations = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }
    if isinstance(node, ast.BinOp):
        return operations[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    if isinstance(node, ast.UnaryOp):
        return signs[type(node.op)](_evaluated(node.operand))
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    raise KeyError(node)


def run(answers: int, seed: int) -> tuple[int, dict[str, float]]:
    """Score so many answers; returns how often the parsers were compared, and seconds of the slowest kinds.

    Raises AssertionError, with the answer, for a wrong score or another value than Python's.
    """
    source, compared, slowest = random.Random(seed), 0, {}

    def timed(kind: str, text: str) -> None:
        start = time.thread_time()
        (score,) = reward([""], [text], [NUMBERS], [TARGET])
        slowest[kind] = max(slowest.get(kind, 0.0), time.thread_time() - start)
        assert any(abs(score - known) < 1e-12 for known in ANSWERS), (score, text[:200])

    for kind, text in megabytes().items():
        timed(kind, text)
    for _ in range(answers):
        kind = source.choices(KINDS, WEIGHTS)[0]
        timed(kind.__name__, kind(source))
        if kind is answer:
            text = expression(source)
            assert value_using(text, NUMBERS) == oracle(text), text
            compared += 1
    return compared, slowest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.thread_time()
    compared, slowest = run(options.answers, options.seed)
    seconds = time.thread_time() - start
    print(f"{options.answers} answers in {seconds:.0f} s; {compared} expressions as Python's parser has them")
    for kind, worst in sorted(slowest.items(), key=lambda item: -item[1]):
        print(f"  {1000 * worst:8.1f} ms at worst: {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
