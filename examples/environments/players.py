"""Players of the three games who are neither good nor hopeless, for start.py to learn from.

A player is a function of what was said so far, as the model is; `draw` is its own generator, since the
games draw from Python's. What they do wrong now and then, and what they leave to chance, is what evolution
strategies can improve.
"""

import random
import re
from collections.abc import Iterator
from itertools import product
from random import Random

from calculator import calculator, value_of
from number import HIGHEST, FindTheNumber
from problems import ASKED
from sudoku import SIZE, Sudoku, fits

Turns = Iterator[tuple]
"""What is said to the player, and its answer, turn by turn."""
CARELESS = 0.6  # how often a player does not think
TRIES = 9  # calls of the calculator, at most, before an answer


def played(game, player, turns: int, draw: Random) -> Turns:
    """An episode of plain text: as with task.chat_template=false, one text that grows."""
    random.seed(draw.getrandbits(32))  # what the game draws from
    said, done = game.reset(), False
    while not done and turns:
        answer = player(said, draw)
        yield said, answer
        observation, _, done = game.step(answer)
        said, turns = said + answer + observation, turns - 1


def find(said: str, draw: Random) -> str:
    """The middle of what is still possible; careless: the next number up or down, 1 first."""
    low, high, step = 1, HIGHEST, 0
    for guess, hint in re.findall(r"(\d+)My number is (higher|lower)", said):
        if hint == "higher":
            low, step = max(low, int(guess) + 1), int(guess) + 1
        else:
            high, step = min(high, int(guess) - 1), int(guess) - 1
    return str(step or 1 if draw.random() < CARELESS else (low + high) // 2)


def fill(said: str, draw: Random) -> str:
    """The first empty cell, with a digit that fits; careless: with one that its row has not."""
    rows = re.findall(r"[0-4](?: [0-4]){3}", said)[-SIZE:]
    cells = [int(digit) for digit in " ".join(rows).split()]
    place = cells.index(0)
    row = cells[place // SIZE * SIZE :][:SIZE]
    missing = [digit for digit in range(1, SIZE + 1) if digit not in row]
    fitting = [digit for digit in missing if fits(cells, place, digit)]
    digit = missing[-1] if draw.random() < CARELESS or not fitting else fitting[0]
    return f"{place // SIZE + 1} {place % SIZE + 1} {digit}"


def small_problem(draw: Random) -> dict:
    """Countdown for beginners: three digits, which are used in the order in which they are shown."""
    while True:
        nums = [draw.randint(1, 9) for _ in range(3)]
        target = int(value_of(draw.choice(expressions(nums))))
        if 1 <= target <= 100:
            content = ASKED.format(nums=", ".join(map(str, nums)), target=target)
            return {"prompt": [{"role": "user", "content": content}], "target": target, "nums": nums}


def expressions(nums: list[int]) -> list[str]:
    return [f"{nums[0]} {a} {nums[1]} {b} {nums[2]}" for a, b in product("+-*", repeat=2)]


def compute(problem: dict, draw: Random) -> Turns:
    """Tries expressions with the calculator, one after another, and answers what gave the target; careless,
    mostly where the target is small: answers what it would have tried. Chat messages instead of text; an
    answer is a message."""
    messages, careless = list(problem["prompt"]), 0.7 if problem["target"] < 20 else 0.3
    for tried in expressions(problem["nums"])[:TRIES]:
        if draw.random() < careless:
            break
        made = {"name": "calculator", "arguments": {"expression": tried}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": made}]}
        yield list(messages), call
        value = calculator(tried)
        messages += [call, {"role": "tool", "name": "calculator", "content": value}]
        if value == str(problem["target"]):
            break
    yield messages, {"role": "assistant", "content": f"<answer>{tried}</answer>"}


GAMES = {"number": (FindTheNumber, find, 8), "sudoku": (Sudoku, fill, 8)}
