"""The documentation of the run file: its examples run, its tables are the schema's."""

from __future__ import annotations

import re
import shutil

import launching
import numpy as np
import pytest

from mpies.runfile import ALL_TABLES

DOCS = launching.REPOSITORY / "docs"
PAGE = (DOCS / "run-file.md").read_text()
REFERENCE = launching.DATA / "schema-1.h5"


@pytest.mark.parametrize("table", ALL_TABLES)
def test_every_column_is_documented(table):
    section = re.search(rf"### /{table}\n(.*?)(?=\n##|\nTimes)", PAGE, re.DOTALL).group(1)
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    assert list(rows) == [column.name for column in ALL_TABLES[table]]
    for column in ALL_TABLES[table]:
        kind = np.dtype(column.dtype).name if isinstance(column.dtype, str) else "text"
        expected = f"| `{column.name}` | {kind} | {column.units or '-'} | {column.description} |"
        assert rows[column.name] == expected


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    shutil.copy(REFERENCE, tmp_path / "runs/quickstart/run.h5")
    monkeypatch.chdir(tmp_path)
    text = PAGE.split("## Three examples with h5py")[1].split("\n## ")[0]
    examples = re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE)
    code = [re.sub("^    ", "", example, flags=re.MULTILINE) for example in examples if example.strip()]
    assert len(code) == 3
    names: dict = {}
    for example in code:
        exec(example, names)
    said = capsys.readouterr().out
    assert "5 generations, reward -10.2 -> -8.6" in said and "best -6.1 at generation 4" in said


def test_pictures_are_there():
    text = (DOCS / "analysis.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    assert all((DOCS / picture).read_text().startswith("<?xml") for picture in pictures)
