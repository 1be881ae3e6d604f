"""An environment of one turn, to time: the row's prompt, and an answer that ends it.

It imports nothing: what the process does that forks episodes, all of these have.
"""


class OneTurn:
    def reset(self, **row: object) -> None:
        return None

    def step(self, answer: str) -> tuple[None, float, bool]:
        return None, 0.0, True
