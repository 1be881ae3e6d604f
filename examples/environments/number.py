"""Find a number: the model guesses, and is told whether the number is higher or lower.

mpirun -n 2 python -m mpies.train examples/environments/number.yaml
"""

import math
import random
import re

HIGHEST = 32


class FindTheNumber:
    """The number follows from the episode's seed.

    Half of the reward is for finding it, the other half for what hints tell: log(before / after) /
    log(highest) of the numbers that were possible before and after a guess.
    """

    def reset(self, highest: int = HIGHEST, **row) -> str:
        if highest < 2:
            raise ValueError(f"highest is {highest}: there is nothing to find")
        self.number = random.randint(1, highest)
        self.low, self.high, self.highest = 1, highest, highest
        self.guesses, self.found = 0, False
        return (
            f"I have chosen a whole number from 1 to {highest}. Guess it. Answer with a number only; I then"
            " say whether mine is higher or lower."
        )

    def step(self, answer: str) -> tuple[str, float, bool]:
        self.guesses += 1
        found = re.search(r"\d{1,4}", answer)
        if not found:
            return "That was no number. Guess again.", 0.0, False
        guess, before = int(found.group()), self.possible
        if guess == self.number:
            self.found = True
            return "Yes!", 0.5 + self.told(before), True
        if guess < self.number:
            self.low = max(self.low, guess + 1)
        else:
            self.high = min(self.high, guess - 1)
        hint = "higher" if guess < self.number else "lower"
        return f"My number is {hint}. Guess again.", self.told(before / self.possible), False

    @property
    def possible(self) -> int:
        return self.high - self.low + 1

    def told(self, ratio: float) -> float:
        return 0.5 * math.log(ratio) / math.log(self.highest)

    def metrics(self) -> dict[str, float]:
        return {"accuracy": float(self.found), "guesses": self.guesses}
