"""Collects what docs/results.md rests on from the run files of runs.txt and from evaluated models.

    python docs/results/collect.py runs/runs [grpo-1.json ...]

Run number n is line n of runs.txt, in runs/runs/n, as jobs/sweep.sbatch leaves it; lines without a run are
left as they are. The JSON files are those of `mpies.evaluate --json`. Writes runs.csv, a row per run, and
results.csv, a row per figure of an evaluation, beside this file; rows of others stay.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluations import kept, write

from mpies import config
from mpies.analyze import open_run
from mpies.runfile import RUN_FILE

HERE = Path(__file__).parent
FIGURES = ("run", "generation", "answers", "split", "figure", "value")
FURTHER = ("normalised", "format")
MEASURED = ("reward_mean", "accuracy", "answer_tokens", "kl", "drift_l2")


def main(folder: str, *evaluated: str) -> None:
    runs, figures = [], []
    for number, line in enumerate((HERE / "runs.txt").read_text().splitlines(), 1):
        path = Path(folder) / str(number) / RUN_FILE
        if path.exists():
            run = open_run(path)
            refuse_other_settings(number, line, run.settings)
            runs.append(facts(number, run))
            figures += of_run(number, run)
    for file in map(Path, evaluated):
        figures += of_model(file)
    keep_others("runs.csv", ("run", "generations", "weights", "sha256"), runs)
    keep_others("results.csv", FIGURES, figures)


def refuse_other_settings(number: int, line: str, settings: dict) -> None:
    asked = config.load(line.split()).model_dump(mode="json")
    for section in ("es", "task"):
        for key, value in asked[section].items():
            if settings[section].get(key, value) != value:
                sys.exit(f"run {number}: {section}.{key} is {settings[section][key]}, not {value}")


def facts(number: int, run) -> tuple:
    """`weights` is the digest of the last generation's, in hexadecimal; `sha256` that of the file."""
    digest = int(run.tables["generation"]["digest"][-1])
    sha = hashlib.sha256(run.path.read_bytes()).hexdigest()
    return number, run.committed, f"{digest:016x}", sha


def of_run(number: int, run) -> Iterator[tuple]:
    prompts = run.settings["task"]["prompts_per_generation"] or 2
    each = run.population * prompts
    for row in run.evaluations.to_dict("records"):
        place = number, row["generation"], row["generation"] * each, row["split"]
        for column in MEASURED:
            if not math.isnan(row[column]):
                yield *place, column.removesuffix("_mean"), round(row[column], 6)
    for row in run.metrics.to_dict("records"):
        if row["name"] in FURTHER:
            generation = row["generation"]
            yield number, generation, generation * each, row["split"], row["name"], round(row["mean"], 6)


def of_model(file: Path) -> Iterator[tuple]:
    content = json.loads(file.read_text())
    for split, evaluation in content["splits"].items():
        found = {figure: value["mean"] for figure, value in evaluation["figures"].items()}
        if content["drift_l2"]:
            found["drift_l2"] = content["drift_l2"]["all"]
        for figure, value in found.items():
            yield file.stem, "", "", split, figure, round(value, 6)


def keep_others(name: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
    """In place of what the file has of these rows' runs, in the runs' order, evaluated models last."""
    made = [dict(zip(columns, row, strict=True)) | {"run": str(row[0])} for row in rows]
    rows_now = kept(HERE / name, "run", {row["run"] for row in made}) + made
    order = sorted(rows_now, key=lambda row: int(row["run"]) if row["run"].isdigit() else math.inf)
    write(HERE / name, columns, order)


if __name__ == "__main__":
    main(*sys.argv[1:])
