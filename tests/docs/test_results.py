"""The pages of results say what runs gave: their tables are made of CSV files, and of nothing else."""

from __future__ import annotations

import csv
import runpy

import launching

from mpies import config

RESULTS = launching.REPOSITORY / "docs" / "results"


def test_the_tables_are_made_from_the_runs():
    made = runpy.run_path(str(RESULTS / "tables.py"))
    pages = [page.read_text() for page in made["PAGES"]]
    frame = made["load"]()
    assert made["filled"](pages, frame) == pages
    frame.loc[frame["run"] == "1", "reward"] += 1
    assert made["filled"](pages, frame) != pages


def test_the_sweeps_rows_are_of_the_lines_that_name_them(monkeypatch):
    monkeypatch.chdir(launching.REPOSITORY)
    columns = runpy.run_path(str(RESULTS / "evaluations.py"))["SETTINGS"]
    lines = [config.load(line.split()) for line in (RESULTS / "sweep_runs.txt").read_text().splitlines()]
    rows = list(csv.DictReader((RESULTS / "sweep.csv").read_text().splitlines()))
    assert rows
    for row in rows:
        asked = lines[int(row["run"]) - 1]
        assert [row[key] for key in columns] == [str(getattr(asked.es, key)) for key in columns]
        assert row["prompts"] == str(asked.task.prompts_per_generation)
        assert row["generation"] in ("0", str(asked.es.generations))


def test_every_run_is_listed_with_its_settings():
    lines = (RESULTS / "runs.txt").read_text().splitlines()
    rows = (RESULTS / "runs.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(number) for number in range(1, len(lines) + 1)]
