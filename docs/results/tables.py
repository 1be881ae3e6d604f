"""Makes the tables of docs/results.md and the pages beside it, and the figure of conciseness.

    python docs/results/tables.py

They are made of the runs.txt and CSV files here. Between two marks, <!-- NAME --> and <!-- end -->, stands
what `TABLES[NAME]` returns; each table is on one page.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot

from mpies import config
from mpies.measure.statistics import Figure
from mpies.probe.rung import shown

HERE = Path(__file__).parent
PAGES = [HERE.parent / name for name in ("results.md", "conciseness.md", "char_count.md", "probe.md")]
SETTINGS = (
    "perturbation", "population", "sigma", "alpha", "seed", "antithetic", "fitness", "alpha_schedule",
    "anchor_decay", "rank",
)  # fmt: skip
ANSWERS = 640


def main() -> None:
    frame = load()
    pages = filled([page.read_text() for page in PAGES], frame)
    for page, text in zip(PAGES, pages, strict=True):
        page.write_text(text)
    draw(frame).savefig(HERE / "trade-off.svg", metadata={"Date": None})


def filled(pages: list[str], frame: pd.DataFrame) -> list[str]:
    """The pages with their tables made anew."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        made = rf"\g<1>{table(frame)}\n\g<2>"
        assert sum(len(place.findall(page)) for page in pages) == 1, name
        pages = [place.sub(made, page) for page in pages]
    return pages


def load() -> pd.DataFrame:
    """A row per evaluation and split: its figures as columns, and the run's settings."""
    lines = (HERE / "runs.txt").read_text().splitlines()
    settings = [of_line(number, line.split()) for number, line in enumerate(lines, 1)]
    tidy = pd.read_csv(HERE / "results.csv", dtype={"run": str})
    tidy["answers"] = tidy["answers"].fillna(ANSWERS).astype(int)
    wide = tidy.pivot_table(index=["run", "answers", "split"], columns="figure", values="value").reset_index()
    return wide.merge(pd.DataFrame(settings), on="run", how="left")


def of_line(number: int, words: list[str]) -> dict:
    made = config.load(words)
    return {"run": str(number), "task": made.task.name} | {key: getattr(made.es, key) for key in SETTINGS}


def chosen(frame: pd.DataFrame, split: str = "held_out", answers: int = ANSWERS, **settings) -> pd.DataFrame:
    """Rows of a split after so many answers; of ES with default settings where none is given."""
    given = {
        "task": "conciseness", "perturbation": "lowrank", "antithetic": True, "fitness": "zscore",
        "alpha_schedule": "constant", "anchor_decay": 0.0, "rank": 1,
    } | settings  # fmt: skip
    rows = frame[(frame["split"] == split) & (frame["answers"] == answers)]
    for key, value in given.items():
        rows = rows[rows[key].isin(value if isinstance(value, list) else [value])]
    return rows


def grpo(frame: pd.DataFrame, split: str = "held_out") -> pd.DataFrame:
    return frame[frame["run"].str.startswith("grpo") & (frame["split"] == split)]


def mean(values: pd.Series, digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def share(values: pd.Series) -> str:
    return f"{100 * values.mean():.0f} %"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grid(frame: pd.DataFrame) -> str:
    """Sigma 0.01: populations against steps."""
    steps = [0.005, 0.01, 0.02, 0.04]
    rows = []
    for noise, population in [*(("lowrank", n) for n in (8, 16, 32, 64)), ("full", 16)]:
        given = {"perturbation": noise, "population": population, "sigma": 0.01, "seed": [1, 2, 3]}
        cells = [chosen(frame, alpha=alpha, **given) for alpha in steps]
        name = str(population) + (", full noise" if noise == "full" else "")
        rows.append([name, *(f"{mean(c['reward'])}, {share(c['accuracy'])}" for c in cells)])
    return markdown(["N", *(f"alpha = {alpha / 0.01:g} sigma" for alpha in steps)], rows)


def row(name: str, frame: pd.DataFrame, trained: pd.DataFrame) -> list[str]:
    count = str(len(frame))
    return [name, count, mean(trained["reward"]), mean(frame["reward"]), share(frame["accuracy"])]


def others(frame: pd.DataFrame) -> str:
    """What else was tried with N = 16, and the reference."""
    rows = []
    for name, changes in VARIANTS.items():
        given = {"population": 16, "sigma": 0.01, "alpha": 0.01} | changes
        held_out, train = (chosen(frame, split, **given) for split in ("held_out", "train"))
        rows.append(row(name, held_out, train))
    rows.append(row("TRL's GRPO, learning rate 1e-5", grpo(frame), grpo(frame, "train")))
    return markdown(["setting", "seeds", "train", "held out", "right, held out"], rows)


VARIANTS = {
    "sigma 0.01, alpha 0.01": {},
    "alpha falls to 0.001 (cosine)": {"alpha_schedule": "cosine"},
    "alpha falls from 0.02 to 0.002 (cosine)": {"alpha": 0.02, "alpha_schedule": "cosine"},
    "sigma 0.0025, alpha 0.0089": {"sigma": 0.0025, "alpha": 0.0089},
    "sigma 0.005, alpha 0.01": {"sigma": 0.005},
    "sigma 0.02, alpha 0.01": {"sigma": 0.02},
    "sigma 0.02, alpha 0.005": {"sigma": 0.02, "alpha": 0.005},
    "independent members": {"antithetic": False},
    "centred ranks, alpha 0.03": {"fitness": "centered_rank", "alpha": 0.03},
    "anchor decay 0.05": {"anchor_decay": 0.05},
    "anchor decay 0.05, alpha 0.015": {"anchor_decay": 0.05, "alpha": 0.015},
    "anchor decay 0.1, alpha 0.02": {"anchor_decay": 0.1, "alpha": 0.02},
    "anchor decay 0.1, sigma and alpha 0.015": {"anchor_decay": 0.1, "sigma": 0.015, "alpha": 0.015},
    "anchor decay 0.05, centred ranks, alpha 0.03": {
        "anchor_decay": 0.05,
        "fitness": "centered_rank",
        "alpha": 0.03,
    },
    "anchor decay 0.1, centred ranks, alpha 0.06": {
        "anchor_decay": 0.1,
        "fitness": "centered_rank",
        "alpha": 0.06,
    },
    "rank 4": {"rank": 4},
}


def paper(frame: pd.DataFrame) -> str:
    """Four seeds at 640 answers, as the paper reports conciseness."""
    rows = []
    for name, changes in {"low rank": {}, "full noise": {"perturbation": "full"}}.items():
        given = {"population": 32, "sigma": 0.01, "alpha": 0.01, "seed": [1, 2, 3, 4]} | changes
        held_out, train = (chosen(frame, split, **given) for split in ("held_out", "train"))
        rows.append([*row(f"SmolLM2-135M, ES, {name}", held_out, train), *distances(held_out)])
    reference = row("SmolLM2-135M, TRL's GRPO", grpo(frame), grpo(frame, "train"))
    rows.append([*reference, *distances(grpo(frame))])
    for name, reward, kl in PAPER:
        rows.append([name, "4", "", "", "", reward, kl, ""])
    return markdown(["", "seeds", "train", "held out", "right, held out", "normalised", "KL", "drift"], rows)


def distances(rows: pd.DataFrame) -> list[str]:
    return [mean(rows["normalised"], 4), mean(rows["kl"], 2), mean(rows["drift_l2"])]


# Table 2 of the paper: normalised reward and KL.
PAPER = (
    ("paper, Qwen2.5-7B, ES, sigma 0.001", ".889 ± .004", ".274 ± .096"),
    ("paper, Qwen2.5-7B, ES, sigma 0.0015", ".919 ± .008", ".813 ± .212"),
    ("paper, Qwen2.5-7B, GRPO without KL penalty", ".867 ± .054", ".861 ± .614"),
    ("paper, Qwen2.5-7B, GRPO, beta 0.0167", ".911 ± .038", "1.591 ± .811"),
)


def anchor(frame: pd.DataFrame) -> str:
    """N = 16: pulled to the initial weights, or not."""
    rows = []
    for decay in (0.0, 0.05):
        given = {"population": 16, "sigma": 0.01, "alpha": 0.01, "anchor_decay": decay, "seed": [1, 2, 3]}
        held_out, train = (chosen(frame, split, **given) for split in ("held_out", "train"))
        measured = (mean(held_out["kl"], 2), mean(held_out["drift_l2"]))
        rows.append([*row(f"{decay:g}", held_out, train), *measured])
    return markdown(["anchor decay", "seeds", "train", "held out", "right, held out", "KL", "drift"], rows)


def countdown(frame: pd.DataFrame) -> str:
    """Before, on the way, and after."""
    mine = frame[(frame["task"] == "countdown") & frame["answers"].isin([0, 768, 1536, 6144])]
    rows = []
    for (split, answers), group in mine.groupby(["split", "answers"]):
        figures = [f"{group[figure].mean():.3f}" for figure in ("reward", "accuracy", "format")]
        rows.append([split.replace("_", " "), str(answers), *figures, f"{group['answer_tokens'].mean():.1f}"])
    return markdown(
        ["problems", "answers evaluated", "reward", "accuracy", "format", "tokens an answer"], rows
    )


def char_count(frame: pd.DataFrame) -> str:
    """Of char_count.csv, which has its own runs."""
    rows = []
    for _, run in pd.read_csv(HERE / "char_count.csv").groupby("run", sort=False):
        before = rights_of(run[run["answers"] == 0])
        for answers, group in run[run["answers"] > 0].groupby("answers"):
            first = group.iloc[0]
            told = [
                first["reward"],
                *(f"{first[key]:g}" for key in ("sigma", "alpha", "population", "prompts")),
            ]
            rows.append([*told, f"{answers:,}", *before, *rights_of(group), str(first["weights"])])
    head = ["reward", "sigma", "alpha", "N", "prompts", "answers", "train, before", "held out, before"]
    return markdown([*head, "train", "held out", "weights"], rows)


def rights_of(evaluations: pd.DataFrame) -> list[str]:
    """Shares of right answers to training and to held-out prompts, with their standard errors."""
    by_split = evaluations.set_index("split")
    return [
        f"{by_split.right[split]:.3f} ± {by_split.error[split]:.3f}" if split in by_split.index else ""
        for split in ("train", "held_out")
    ]


def first_and_last(evaluations: pd.DataFrame, by: str = "generation") -> list[pd.DataFrame]:
    return [evaluations[evaluations[by] == end(evaluations[by])] for end in (min, max)]


def environments(frame: pd.DataFrame) -> str:
    """Of environments.csv, which has its own runs: held-out episodes before and after."""
    played = pd.read_csv(HERE / "environments.csv")
    played = played[played["split"] == "held_out"]
    rows = []
    for (game, turns, schedule), runs in played.groupby(["game", "max_turns", "schedule"], sort=False):
        first, last = first_and_last(runs, by="episodes")
        cells = [mean(part[figure], 2) for figure in ("reward", "accuracy") for part in (first, last)]
        rows.append([game, str(turns), schedule, str(len(last)), f"{last['episodes'].max():,}", *cells])
    head = ["game", "turns", "sigma", "seeds", "episodes", "reward before", "after", "won before", "after"]
    return markdown(head, rows)


def swept() -> pd.DataFrame:
    """Of sweep.csv and sweep_runs.txt: held-out evaluations, with what their run's line has changed."""
    lines = [line.split() for line in (HERE / "sweep_runs.txt").read_text().splitlines()]
    played = pd.read_csv(HERE / "sweep.csv").sort_values("run", kind="stable")
    played["change"] = [
        " ".join(word for word in lines[run - 1] if word not in lines[0] and not word.startswith("es.seed="))
        for run in played["run"]
    ]
    return played[played["split"] == "held_out"]


def sweep(frame: pd.DataFrame) -> str:
    """Held-out episodes won, a row per change of settings."""
    rows = []
    for change, runs in swept().groupby("change", sort=False):
        first, last = first_and_last(runs)
        cells = [mean(part["right"], 3) for part in (first, last)]
        rows.append(
            [f"`{change}`" if change else "as above", str(len(last)), f"{last['answers'].max():,}", *cells]
        )
    return markdown(["changed", "seeds", "episodes", "won before", "after"], rows)


def probes(frame: pd.DataFrame) -> str:
    """Of probes.csv and sweep.csv: what was recommended, and what runs of the number game win with it."""
    played = swept()
    rows = []
    for _, probe in pd.read_csv(HERE / "probes.csv").iterrows():
        change = f"es.sigma={probe['sigma']:g} es.alpha={probe['alpha']:g}"
        runs = played[(played["change"] == change) & probe["probe"].startswith("number")]
        won = mean(first_and_last(runs)[1]["right"], 3) if len(runs) else ""
        name, seed = probe["probe"].rpartition("-")[0].rstrip("0123456789"), str(probe["seed"])
        gain = shown(Figure(probe["gain"], probe["error"])).replace("+-", " ± ")
        told = [f"{probe[figure]:g}" for figure in ("sigma", "alpha")]
        rows.append([name, seed, str(probe["pairs"]), f"{probe['answers']:,}", gain, *told, won])
    head = ["probe", "seed", "pairs", "answers", "the step gains", "sigma", "alpha", "won by runs with these"]
    return markdown(head, rows)


def questions(frame: pd.DataFrame) -> str:
    """Of questions.csv, which has its own runs: held-out questions before and after."""
    asked = pd.read_csv(HERE / "questions.csv")
    asked = asked[asked["split"] == "held_out"]
    rows = []
    for _, run in asked.groupby("run", sort=False):
        ends = [part.iloc[0] for part in first_and_last(run)]
        told = [
            f"{one[figure]:.{digits}f}" for figure, digits in (("right", 2), ("tokens", 1)) for one in ends
        ]
        last = ends[1]
        rows.append([str(last["seed"]), f"{last['answers']:,}", *told, str(last["weights"])])
    head = ["seed", "answers", "right before", "after", "tokens before", "after", "weights"]
    return markdown(head, rows)


TABLES = {
    "grid": grid,
    "others": others,
    "paper": paper,
    "anchor": anchor,
    "char_count": char_count,
    "countdown": countdown,
    "environments": environments,
    "probes": probes,
    "questions": questions,
    "sweep": sweep,
}


def draw(frame: pd.DataFrame):
    """Left: held-out reward against answers. Right: what a reward is paid with, in right answers."""
    matplotlib.rcParams |= {"svg.hashsalt": "mpies", "font.size": 9}
    figure, (curves, paid) = pyplot.subplots(1, 2, figsize=(8.6, 4.2), layout="constrained")
    held_out = frame[(frame["task"] == "conciseness") & (frame["split"] == "held_out")]
    for color, (name, settings) in zip(("C0", "C1", "C2", "C3"), CURVES.items()):
        path = over_seeds(held_out, **settings)
        curves.plot(path.index, path["reward"], color=color, marker=".", label=name)
        paid.plot(path["reward"], path["accuracy"], color=color, marker=".", label=name)
    everything = held_out.groupby([key for key in SETTINGS if key != "seed"] + ["answers"])
    points = everything[["reward", "accuracy"]].mean()
    paid.scatter(
        points["reward"],
        points["accuracy"],
        s=6,
        color="0.8",
        zorder=0,
        label="every setting of ES (means over seeds)",
    )
    reference = grpo(frame)[["reward", "accuracy"]].mean()
    for axes, x, y in ((curves, ANSWERS, reference["reward"]), (paid, *reference)):
        axes.plot(x, y, "k*", markersize=9, label="GRPO", linestyle="none")
    curves.set(xlabel="answers evaluated", ylabel="held-out reward")
    paid.set(xlabel="held-out reward", ylabel="share of right held-out answers")
    figure.legend(*paid.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


CURVES = {
    "low rank, N = 16, alpha = 2 sigma": {"population": 16, "alpha": 0.02},
    "low rank, N = 16, alpha = sigma": {"population": 16, "alpha": 0.01},
    "low rank, N = 32, alpha = sigma": {"population": 32, "alpha": 0.01},
    "full, N = 32, alpha = sigma": {"population": 32, "alpha": 0.01, "perturbation": "full"},
}


def over_seeds(held_out: pd.DataFrame, **settings) -> pd.DataFrame:
    """Means by answers."""
    rows = [
        chosen(held_out, answers=answers, sigma=0.01, **settings)
        for answers in sorted(set(held_out["answers"]))
    ]
    return pd.concat(rows).groupby("answers")[["reward", "accuracy"]].mean()


if __name__ == "__main__":
    main()
