"""docs/results.md says what the runs gave: its tables are made from results.csv, and from nothing else."""

from __future__ import annotations

import runpy

import launching

RESULTS = launching.REPOSITORY / "docs" / "results"


def test_the_tables_are_made_from_the_runs():
    made = runpy.run_path(str(RESULTS / "tables.py"))
    page = (RESULTS.parent / "results.md").read_text()
    frame = made["load"]()
    assert made["filled"](page, frame) == page
    frame.loc[frame["run"] == "1", "reward"] += 1
    assert made["filled"](page, frame) != page


def test_every_run_is_listed_with_its_settings():
    lines = (RESULTS / "runs.txt").read_text().splitlines()
    rows = (RESULTS / "runs.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(number) for number in range(1, len(lines) + 1)]
