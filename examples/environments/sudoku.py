"""Sudoku of 4 x 4: the model fills one cell a turn.

mpirun -n 2 python -m mpies.train examples/environments/sudoku.yaml
"""

import random
import re

SIZE, BOX = 4, 2
MOVE = re.compile(r"\b([1-4])\D{0,9}([1-4])\D{0,9}([1-4])\b")


class Sudoku:
    """The board follows from the episode's seed, or is the row's `board`: 16 digits, 0 for an empty cell."""

    def reset(self, board: str = "", empty: int = 4, **row) -> str:
        self.cells = [int(digit) for digit in board] if board else made_up(empty)
        self.empty, self.wrong = self.cells.count(0), 0
        return (
            "Solve this Sudoku: every row, column and 2 x 2 box has each of the digits 1 to 4 once; 0 is an"
            f" empty cell.\n{self.shown()}\nAnswer with one cell: ROW COLUMN DIGIT, for example 2 3 4."
        )

    def step(self, answer: str) -> tuple[str, float, bool]:
        found = MOVE.search(answer)
        if not found:
            return self.no("Answer with ROW COLUMN DIGIT.")
        row, column, digit = (int(number) for number in found.groups())
        place = (row - 1) * SIZE + column - 1
        if self.cells[place]:
            return self.no(f"That cell has a {self.cells[place]}.")
        if not fits(self.cells, place, digit):
            return self.no(f"A {digit} cannot be there.")
        self.cells[place] = digit
        if not solvable(self.cells):
            self.cells[place] = 0
            return self.no(f"With a {digit} there, it has no solution.")
        done = 0 not in self.cells
        return "Solved." if done else f"Good.\n{self.shown()}\n", 1.0 / self.empty, done

    def metrics(self) -> dict[str, float]:
        return {"accuracy": float(0 not in self.cells), "wrong moves": self.wrong}

    def no(self, why: str) -> tuple[str, float, bool]:
        self.wrong += 1
        return f"{why}\n{self.shown()}\n", 0.0, False

    def shown(self) -> str:
        rows = [self.cells[i : i + SIZE] for i in range(0, SIZE * SIZE, SIZE)]
        return "\n".join(" ".join(map(str, row)) for row in rows)


class LongSudoku(Sudoku):
    """Six empty cells instead of four."""

    def reset(self, board: str = "", empty: int = 6, **row) -> str:
        return super().reset(board, empty)


def made_up(empty: int) -> list[int]:
    """A board with a solution, of which so many cells are empty."""
    cells = [0] * SIZE * SIZE
    digits = random.sample(range(1, SIZE + 1), SIZE)
    for row in range(SIZE):
        for column in range(SIZE):
            cells[row * SIZE + column] = digits[(BOX * (row % BOX) + row // BOX + column) % SIZE]
    for place in random.sample(range(SIZE * SIZE), empty):
        cells[place] = 0
    return cells


def fits(cells: list[int], place: int, digit: int) -> bool:
    """Is the digit not in the cell's row, column or box yet?"""
    row, column = divmod(place, SIZE)
    for other, there in enumerate(cells):
        r, c = divmod(other, SIZE)
        near = r == row or c == column or (r // BOX == row // BOX and c // BOX == column // BOX)
        if near and there == digit:
            return False
    return True


def solvable(cells: list[int]) -> bool:
    if 0 not in cells:
        return True
    place = cells.index(0)
    tried = (digit for digit in range(1, SIZE + 1) if fits(cells, place, digit))
    return any(solvable([*cells[:place], digit, *cells[place + 1 :]]) for digit in tried)
