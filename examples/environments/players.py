"""Players of the three games who are neither good nor hopeless, for start.py to learn from.

A player is a function of what was said so far, as the model is; `draw` is its own generator, since the
games draw from Python's. What they do wrong now and then, and what they leave to chance, is what evolution
strategies can improve.
"""

import json
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


def played(game, player, turns: int, draw: Random, **row) -> Turns:
    """An episode of plain text: as with task.chat_template=false, one text that grows."""
    random.seed(draw.getrandbits(32))  # what the game draws from
    said, done = game.reset(**row), False
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
    """The first empty cell, with a digit that fits and was not refused; careless: with one that its row has
    not."""
    rows = re.findall(r"[0-4](?: [0-4]){3}", said)[-SIZE:]
    cells = [int(digit) for digit in " ".join(rows).split()]
    place = cells.index(0)
    row = cells[place // SIZE * SIZE :][:SIZE]
    missing = [digit for digit in range(1, SIZE + 1) if digit not in row]
    refused = re.findall(r"(\d)(?:A|With)", said.rpartition("Good.")[2])
    fitting = [digit for digit in missing if fits(cells, place, digit) and str(digit) not in refused]
    digit = missing[-1] if draw.random() < CARELESS or not fitting else fitting[0]
    return f"{place // SIZE + 1} {place % SIZE + 1} {digit}"


def small_problem(draw: Random) -> dict:
    """Countdown for beginners: sums and products of three digits, in the order in which they are shown."""
    while True:
        nums = [draw.randint(1, 9) for _ in range(3)]
        target = int(value_of(draw.choice(expressions(nums))))
        if 1 <= target <= 100:
            content = ASKED.format(nums=", ".join(map(str, nums)), target=target)
            return {"prompt": [{"role": "user", "content": content}], "target": target, "nums": nums}


def expressions(nums: list[int]) -> list[str]:
    return [f"{nums[0]} {a} {nums[1]} {b} {nums[2]}" for a, b in product("+*", repeat=2)]


def compute(problem: dict, draw: Random) -> Turns:
    """Tries expressions with the calculator, one after another, until one gives the target; careless, mostly
    where the target is small: answers at once. Chat messages instead of text; an answer is a message."""
    messages, tried = list(problem["prompt"]), draw.choice(expressions(problem["nums"]))
    if draw.random() > (0.8 if problem["target"] < 30 else 0.4):
        for tried in expressions(problem["nums"]):
            made = {"name": "calculator", "arguments": {"expression": tried}}
            calls = [{"type": "function", "function": made}]
            call = {"role": "assistant", "content": "", "tool_calls": calls}
            yield list(messages), call
            value = calculator(tried)
            messages += [call, {"role": "tool", "name": "calculator", "content": value}]
            if value == str(problem["target"]):
                break
    yield messages, {"role": "assistant", "content": f"<answer>{tried}</answer>"}


def plays(name: str, draw: Random) -> Turns:
    """An episode of a game of plain text, in a horizon that the model will meet."""
    if name == "number":
        return played(FindTheNumber(), find, 8, draw)
    return played(Sudoku(), fill, 9, draw, empty=draw.choice([4, 6]))


if __name__ == "__main__":
    draw = Random(42)
    for _ in range(640):
        print(json.dumps(small_problem(draw)))
