"""The exact value of an arithmetic expression that a model wrote.

Its text is hostile until proven harmless: nothing of it is run, and it becomes a number only after it
has turned out to be made of the expected numbers, so that no value can grow. Time and memory are
proportional to its length, nesting included.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction

# re.ASCII or not, [0-9] never matches the digits of other scripts.
ALLOWED = re.compile(r"[0-9+\-*/() ]+")
NUMBER = re.compile(r"[0-9]+")
TOKEN = re.compile(r"[0-9]+|[-+*/()]")

BINARY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SIGN = "sign"  # the minus of "3 * -(4 + 5)"
# A parenthesis ends every expression.
PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, SIGN: 3}


def value_using(expression: str, numbers: list[int]) -> Fraction | None:
    """The value of `expression` if it uses each of the natural `numbers` exactly once; else None.

    Allowed are digits, + - * / ( ) and spaces. Whatever is not an expression of them (`2 ** 3`, `7 // 2`,
    `2 (3)`, `07`), and a division by zero, has no value.
    """
    if not ALLOWED.fullmatch(expression):
        return None
    # As text: 007 is no number of ours, and one with a million digits is not converted.
    if sorted(NUMBER.findall(expression)) != sorted(map(str, numbers)):
        return None
    try:
        return _value(TOKEN.findall(expression))
    except (_SyntaxError, ZeroDivisionError):
        return None


class _SyntaxError(Exception):
    pass


def _value(tokens: list[str]) -> Fraction:
    """Dijkstra's shunting-yard algorithm: two stacks instead of recursion."""
    values: list[Fraction] = []
    operators: list[str] = []
    operand_expected = True
    for token in tokens:
        starts_operand = token == "(" or token.isdigit()
        if starts_operand and not operand_expected:
            raise _SyntaxError  # 2 (3), 1 2
        if token.isdigit():
            values.append(Fraction(int(token)))
            operand_expected = False
        elif token == "(":
            operators.append(token)
        elif operand_expected:
            if token not in "+-":
                raise _SyntaxError
            if token == "-":
                _negate(operators)
        elif token == ")":
            _apply_down_to(0, values, operators)
            if not operators:
                raise _SyntaxError
            operators.pop()
        else:
            _apply_down_to(PRECEDENCE[token] - 1, values, operators)
            operators.append(token)
            operand_expected = True
    if operand_expected:
        raise _SyntaxError
    _apply_down_to(0, values, operators)
    if operators:  # a parenthesis that is not closed
        raise _SyntaxError
    return values[0]


def _negate(operators: list[str]) -> None:
    """Put a minus sign on the stack; it and the one before cancel, or millions would take a second."""
    if operators and operators[-1] == SIGN:
        operators.pop()
    else:
        operators.append(SIGN)


def _apply_down_to(precedence: int, values: list[Fraction], operators: list[str]) -> None:
    """Apply the operators on top of the stack that bind more tightly than that."""
    while operators and PRECEDENCE[operators[-1]] > precedence:
        symbol = operators.pop()
        right = values.pop()
        values.append(-right if symbol == SIGN else BINARY[symbol](values.pop(), right))
