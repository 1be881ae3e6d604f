"""Writes problems.jsonl: Countdown with three numbers, each of which has a solution.

python examples/environments/problems.py > examples/environments/problems.jsonl
"""

import json
import random

ASKED = (
    "Using each of the numbers {nums} once, and + - * / with parentheses, make {target}. You may compute with"
    " the calculator. Write the expression at the end as <answer>EXPRESSION</answer>."
)


def problem(draw: random.Random) -> dict:
    """Three numbers, put together by two operations that stay whole and small."""
    while True:
        nums = [draw.randint(1, 25) for _ in range(3)]
        value = nums[0]
        for number in nums[1:]:
            value = draw.choice([value + number, value - number, value * number])
        if 10 <= value <= 100:
            shown = draw.sample(nums, 3)
            content = ASKED.format(nums=", ".join(map(str, shown)), target=value)
            return {"prompt": [{"role": "user", "content": content}], "target": value, "nums": shown}


if __name__ == "__main__":
    draw = random.Random(42)
    for _ in range(150):
        print(json.dumps(problem(draw)))
