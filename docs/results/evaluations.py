"""Collects evaluations of the runs that docs/results.md tells of, into a CSV file beside it.

    python docs/results/evaluations.py docs/results/char_count.csv runs/char_count/*/run.h5

A row per evaluation: the run's own, and of a run that reads only those in generation-N.json beside its file,
which `mpies.evaluate --json` wrote of its model. `weights` is the digest of that generation's weights,
`error` the standard error of the share of right answers, from the number of prompts. Rows of runs that are
not given stay.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpies.analyze import open_run
from mpies.analyze.run import Run

SETTINGS = ("perturbation", "rank", "population", "sigma", "alpha", "seed")
COLUMNS = (
    "run",
    "reward",
    *SETTINGS,
    "prompts",
    "generation",
    "answers",
    "split",
    "right",
    "error",
    "tokens",
    "weights",
)


def main(collected: Path, *files: str) -> None:
    names = {Path(file).parent.name for file in files}
    made = [row for file in files for row in of_run(Path(file))]
    write(collected, COLUMNS, kept(collected, "run", names) + made)


def kept(collected: Path, key: str, names: set[str]) -> list[dict]:
    """The rows that a file has, but for those that are named, which are made anew."""
    known = csv.DictReader(collected.read_text().splitlines()) if collected.exists() else ()
    return [row for row in known if row[key] not in names]


def write(collected: Path, columns: Sequence[str], rows: list[dict]) -> None:
    with open(collected, "w", newline="") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def of_run(file: Path) -> Iterator[dict]:
    run = open_run(file)
    es, prompts = run.settings["es"], run.settings["task"]["prompts_per_generation"]
    digests = [run.attributes["model_digest"], *run.tables["generation"]["digest"]]
    for row in evaluated(file.parent, run):
        right, number = row["accuracy"], row["generation"]
        yield {
            "run": file.parent.name,
            "reward": " ".join(name.rpartition(":")[2] for name in run.settings["task"]["reward"]),
            **{key: es[key] for key in SETTINGS},
            "prompts": prompts,
            "generation": number,
            "answers": number * es["population"] * prompts,
            "split": row["split"],
            "right": round(right, 6),
            "error": round(math.sqrt(right * (1 - right) / row["prompts"]), 6),
            "tokens": round(row["answer_tokens"], 3),
            "weights": f"{int(digests[number]):016x}",
        }


def evaluated(folder: Path, run: Run) -> Iterator[dict]:
    """generation, split, prompts, accuracy and answer_tokens of each evaluation that measured accuracy."""
    where = ["generation", "split"]
    counts = run.prompts.groupby(where).size()
    for row in run.evaluations.to_dict("records"):
        if math.isfinite(row["accuracy"]):
            yield row | {"prompts": counts[row["generation"], row["split"]]}
    for file in sorted(folder.glob("generation-*.json")):
        for split, found in json.loads(file.read_text())["splits"].items():
            figures = {name: figure["mean"] for name, figure in found["figures"].items()}
            number = int(file.stem.removeprefix("generation-"))
            yield figures | {"generation": number, "split": split, "prompts": found["prompts"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
