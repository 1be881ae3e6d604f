"""Draws char_count.csv: right held-out answers by answers evaluated, a line per run.

    python docs/results/char_count.py

Bars are standard errors of the share. What is published of GRPO is drawn as levels, since its answers
would be far to the right.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot, ticker

HERE = Path(__file__).parent
PUBLISHED = {"published start": 0.435, "published, 144,000 answers of GRPO": 0.6}
COLORS = {"right": "C3", "likely": "C0", "known": "C2"}


def main() -> None:
    draw(pd.read_csv(HERE / "char_count.csv")).savefig(HERE / "char_count.svg", metadata={"Date": None})


def draw(frame: pd.DataFrame):
    matplotlib.rcParams |= {"svg.hashsalt": "mpies", "font.size": 9}
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for _, run in frame[frame["split"] == "held_out"].groupby("run", sort=False):
        if len(run) > 1:
            color = COLORS[run["reward"].iloc[0]]
            axes.errorbar(
                run["answers"],
                run["right"],
                run["error"],
                color=color,
                marker=".",
                linewidth=1,
                elinewidth=0.6,
            )
    for (name, level), style in zip(PUBLISHED.items(), (":", "--")):
        axes.axhline(level, color="0.4", linestyle=style, linewidth=1, label=name)
    for name, color in COLORS.items():
        axes.plot([], [], color=color, marker=".", label=f"reward: {name}")
    axes.set(xlabel="answers evaluated (known: readings)", ylabel="share right of 1,000 held out")
    axes.xaxis.set_major_locator(ticker.MultipleLocator(10_000))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    main()
