"""Countdown with a calculator: the model may compute before it answers.

mpirun -n 2 python -m mpies.train examples/environments/calculator.yaml
"""

import ast
import operator
import re
from fractions import Fraction

LONGEST = 100  # characters of an expression
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculator(expression: str) -> str:
    """
    Computes the value of an arithmetic expression.

    Args:
        expression: Numbers, the signs + - * / and parentheses, such as "(3 + 5) * 2".

    Returns:
        The value.
    """
    return str(value_of(expression))


def right(prompts, completions, target, nums, log_extra=None, **columns) -> list[float]:
    """1 where the last answer ends in <answer>EXPRESSION</answer> that is the target, of all the numbers."""
    found = [
        float(is_right(c[-1]["content"], t, n)) for c, t, n in zip(completions, target, nums, strict=True)
    ]
    if log_extra:
        log_extra("accuracy", found)
    return found


def reached(prompts, completions, target, **columns) -> list[float]:
    """1 where the calculator gave the target: for models that do not know yet what it is good for."""
    values = ([m["content"] for m in c if m["role"] == "tool"] for c in completions)
    return [float(str(t) in each) for each, t in zip(values, target, strict=True)]


def is_right(answer: str, target: int, nums: list[int]) -> bool:
    _, found, rest = answer.rpartition("<answer>")
    expression = rest.partition("</answer>")[0]
    try:
        used = sorted(int(number) for number in re.findall(r"[0-9]{1,6}", expression[:LONGEST]))
        return bool(found) and used == sorted(nums) and value_of(expression) == target
    except (ValueError, ZeroDivisionError):
        return False


def value_of(expression: str) -> Fraction:
    """What it comes to, exactly. Raises ValueError for all but sums, products and quotients of numbers."""
    if len(expression) > LONGEST:
        raise ValueError(f"an expression has up to {LONGEST} characters")
    try:
        return computed(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is no expression") from None


def computed(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](computed(node.left), computed(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -computed(node.operand)
    raise ValueError("only numbers, + - * / and parentheses are computed")
