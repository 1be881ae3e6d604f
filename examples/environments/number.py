"""Find a number: the model guesses, and is told whether the number is higher or lower.

mpirun -n 2 python -m mpies.train examples/environments/number.yaml
"""

import random
import re

HIGHEST = 32


class FindTheNumber:
    """The number follows from the episode's seed."""

    def reset(self, highest: int = HIGHEST, **row) -> str:
        self.number = random.randint(1, highest)
        self.guesses = 0
        return (
            f"I have chosen a whole number from 1 to {highest}. Guess it. Answer with a number only; I then"
            " say whether mine is higher or lower."
        )

    def step(self, answer: str) -> tuple[str, float, bool]:
        self.guesses += 1
        found = re.search(r"\d{1,4}", answer)
        if not found:
            return "That was no number. Guess again.", 0.0, False
        guess = int(found.group())
        if guess == self.number:
            return "Yes!", 1.0, True
        return f"My number is {'higher' if guess < self.number else 'lower'}. Guess again.", 0.0, False

    def metrics(self) -> dict[str, float]:
        return {"guesses": self.guesses}
