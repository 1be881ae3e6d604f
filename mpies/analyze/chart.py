"""Curves in a terminal, as text."""

from __future__ import annotations

import numpy as np

# Bits of a braille character's dots, (row, column), in Unicode's order.
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
BLANK = 0x2800
BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-=+*#@"


def sparkline(values: np.ndarray, width: int, plain: bool = False) -> str:
    """Values as a line of at most `width` blocks, from their lowest to their highest. NaN is a gap."""
    values = binned(values, width)
    there = np.isfinite(values)
    if not there.any():
        return ""
    low, high = values[there].min(), values[there].max()
    levels = np.nan_to_num((values - low) / (high - low if high > low else 1.0))
    blocks = PLAIN_BLOCKS if plain else BLOCKS
    return "".join(blocks[round(level * 7)] if ok else " " for level, ok in zip(levels, there))


def binned(values: np.ndarray, width: int) -> np.ndarray:
    """At most `width` values: means over equal stretches, NaN left out."""
    if len(values) <= width:
        return np.asarray(values, dtype=float)
    stretch = np.arange(len(values)) * width // len(values)
    there = np.isfinite(values)
    total = np.bincount(stretch, weights=np.where(there, values, 0.0), minlength=width)
    number = np.bincount(stretch, weights=there, minlength=width)
    return np.divide(total, number, out=np.full(width, np.nan), where=number > 0)


def draw_chart(
    curve: np.ndarray,
    points: dict[str, tuple[np.ndarray, np.ndarray]],
    width: int,
    height: int,
    plain: bool = False,
) -> list[str]:
    """A curve over 0 ... len(curve) - 1, and points marked by a character each, as lines of text.

    `points` maps a character to (x, y), in the curve's coordinates. Where there is nothing finite to
    show, there are no lines. `plain` uses ASCII only.
    """
    ys = np.concatenate([curve, *(y for _, y in points.values())])
    ys = ys[np.isfinite(ys)]
    if not ys.size:
        return []
    low, high = float(ys.min()), float(ys.max())
    last = max([len(curve) - 1, 1, *(x.max() for _, x_y in points.items() for x in x_y[:1] if x.size)])
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    columns = max(10, width - margin - 2)
    cells = _curve_cells(curve, last, low, high, columns, height, plain)
    for mark, (x, y) in points.items():
        for column, row in zip(*_places(x, y, last, low, high, columns, height)):
            cells[row][column] = mark
    bar, corner, dash = ("|", "+", "-") if plain else ("│", "└", "─")
    lines = [f"{label:>{margin}} {bar}{''.join(row)}" for label, row in zip(labels, cells)]
    scale = f"{'0':<{columns - len(str(int(last)))}}{int(last)}"
    return [*lines, f"{'':{margin}} {corner}{dash * columns}", f"{'':{margin}}  {scale}"]


def _curve_cells(curve, last, low, high, columns, height, plain) -> list[list[str]]:
    """The curve as characters, by row and column."""
    across, down = (1, 1) if plain else (2, 4)
    shares = binned(curve, columns * across)
    if len(shares) > 1 and np.isfinite(shares).all():  # few points become a line
        dense = np.linspace(0, len(shares) - 1, columns * across)
        shares = np.interp(dense, np.arange(len(shares)), shares)
    x = np.linspace(0, len(curve) - 1, len(shares)) if len(curve) else np.zeros(0)
    column, row = _places(x, shares, last, low, high, columns * across, height * down)
    if plain:
        cells = np.full((height, columns), ord(" "))
        cells[row, column] = ord(".")
    else:
        cells = np.full((height, columns), BLANK)
        np.bitwise_or.at(cells, (row // 4, column // 2), DOTS[row % 4, column % 2])
    return [[chr(code).replace(chr(BLANK), " ") for code in line] for line in cells.tolist()]


def _places(x, y, last, low, high, columns, rows) -> tuple[np.ndarray, np.ndarray]:
    """(column, row) of the finite points, row 0 on top."""
    there = np.isfinite(y)
    across = np.round(x[there] / last * (columns - 1)).astype(int)
    up = (y[there] - low) / (high - low) if high > low else np.full(np.count_nonzero(there), 0.5)
    return across, np.round((1 - up) * (rows - 1)).astype(int)
