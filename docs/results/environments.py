"""Collects the runs of environments_runs.txt into environments.csv beside it, and draws their curves.

    python docs/results/environments.py runs/environments

Run number n is line n, in runs/environments/n; lines whose run is not there keep their rows. A row per
evaluation and split; `episodes` are those that the members have played so far, `weights` is the digest of
that generation's weights. Runs that have not ended are left out. Without a folder, it only draws.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
from evaluations import write
from matplotlib import pyplot

from mpies import config
from mpies.analyze import open_run
from mpies.runfile import RUN_FILE

HERE = Path(__file__).parent
FILE = HERE / "environments.csv"
SETTINGS = ("game", "max_turns", "schedule", "seed")
COLUMNS = ("run", *SETTINGS, "generation", "episodes", "split", "reward", "accuracy", "turns", "weights")
SCHEDULES = {"constant": "C0", "cosine": "C1"}


def main(folder: str = "") -> None:
    if folder:
        collect(Path(folder))
    draw(pd.read_csv(FILE)).savefig(HERE / "environments.svg", metadata={"Date": None})


def collect(folder: Path) -> None:
    known = list(csv.DictReader(FILE.read_text().splitlines())) if FILE.exists() else []
    rows = []
    for number, line in enumerate((HERE / "environments_runs.txt").read_text().splitlines(), 1):
        if (path := folder / str(number) / RUN_FILE).exists():
            run = open_run(path)
            refuse_other_settings(number, config.load(line.split()).model_dump(mode="json"), run.settings)
            if run.evaluations["generation"].max() == run.settings["es"]["generations"]:
                rows += of_run(number, run)
                continue
        rows += [row for row in known if row["run"] == str(number)]
    write(FILE, COLUMNS, rows)


def refuse_other_settings(number: int, asked: dict, settings: dict) -> None:
    """All of evolution strategies, and of the game what this page tells."""
    there = [(one["es"], one["task"]["max_turns"], game_of(one["task"])) for one in (asked, settings)]
    if there[0] != there[1]:
        sys.exit(f"run {number} was made with other settings: {there[1]}, not {there[0]}")


def game_of(task: dict) -> str:
    return (task["environment"] or task["tools"][0]).rpartition(":")[2]


def of_run(number: int, run) -> Iterator[dict]:
    es, task = run.settings["es"], run.settings["task"]
    digests = [run.attributes["model_digest"], *run.tables["generation"]["digest"]]
    turns = run.metrics[run.metrics["name"] == "turns"].set_index(["generation", "split"])["mean"]
    for row in run.evaluations.to_dict("records"):
        generation = row["generation"]
        yield {
            "run": number,
            "game": game_of(task),
            "max_turns": task["max_turns"],
            "schedule": es["sigma_schedule"],
            "seed": es["seed"],
            "generation": generation,
            "episodes": generation * es["population"] * task["prompts_per_generation"],
            "split": row["split"],
            "reward": round(row["reward_mean"], 6),
            "accuracy": round(row["accuracy"], 6),
            "turns": round(turns[generation, row["split"]], 3),
            "weights": f"{int(digests[generation]):016x}",
        }


def draw(frame: pd.DataFrame):
    """A column per game and horizon: held-out reward above, accuracy below, by episodes. Mean and standard
    deviation over seeds."""
    matplotlib.rcParams |= {"svg.hashsalt": "mpies", "font.size": 9}
    held_out = frame[frame["split"] == "held_out"]
    games = list(held_out.groupby(["game", "max_turns"], sort=False))
    figure, axes = pyplot.subplots(
        2,
        len(games),
        figsize=(1.7 * len(games) + 0.6, 4),
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    for (above, below), ((game, turns), rows) in zip(axes.T, games, strict=True):
        above.set_title(f"{game}\n{turns} turns", fontsize=9)
        for schedule, color in SCHEDULES.items():
            curves = rows[rows["schedule"] == schedule].groupby("episodes")
            for place, figure_name in ((above, "reward"), (below, "accuracy")):
                mean, spread = curves[figure_name].mean(), curves[figure_name].std().fillna(0)
                place.plot(mean.index, mean, color=color, marker=".", label=f"sigma {schedule}")
                place.fill_between(
                    mean.index, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0
                )
        below.set_xlabel("episodes")
    axes[0, 0].set_ylabel("held-out reward")
    axes[1, 0].set_ylabel("share won")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
