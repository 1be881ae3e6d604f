"""The pages of results say what runs gave: their tables are made of CSV files, and of nothing else."""

from __future__ import annotations

import runpy

import launching

RESULTS = launching.REPOSITORY / "docs" / "results"


def test_the_tables_are_made_from_the_runs():
    made = runpy.run_path(str(RESULTS / "tables.py"))
    pages = [page.read_text() for page in made["PAGES"]]
    frame = made["load"]()
    assert made["filled"](pages, frame) == pages
    frame.loc[frame["run"] == "1", "reward"] += 1
    assert made["filled"](pages, frame) != pages


def test_every_run_is_listed_with_its_settings():
    lines = (RESULTS / "runs.txt").read_text().splitlines()
    rows = (RESULTS / "runs.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(number) for number in range(1, len(lines) + 1)]
