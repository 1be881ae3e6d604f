"""What a site's monitoring is told of a run: a file for Prometheus, the Slurm job's comment."""

from __future__ import annotations

import math
import re
import stat
import time

import pytest

from mpies import config
from mpies.errors import InputError
from mpies.run.monitoring import Comments, Monitor
from mpies.run.screen import Screen
from mpies.runfile import TABLES

ROW = {column.name: 0.5 for column in TABLES["generation"] if column.name != "checksum"}


def monitor(said: list[str], *changes: str) -> Monitor:
    return Monitor(config.load(["run.directory=runs/mine", "es.generations=10", *changes]), said.append)


def values(text: str) -> dict[str, float]:
    """Name -> value, of lines without comments."""
    lines = re.findall(r"^(\w+)\{run=\"(.*)\"\} (\S+)$", text, re.MULTILINE)
    assert {run for _, run, _ in lines} == {"runs/mine"}
    return {name: float(value) for name, _, value in lines}


def test_the_file_has_what_the_run_file_has(tmp_path):
    file = tmp_path / "mine.prom"
    looking = monitor([], f"run.metrics={file}")
    looking.begin(3)
    began = values(file.read_text())
    assert (began["mpies_generations"], began["mpies_generations_target"]) == (3, 10)
    assert math.isnan(began["mpies_seconds_left"])
    looking.generation(4, {**ROW, "seconds": 2.0, "reward_mean": math.nan})
    assert math.isnan(values(file.read_text())["mpies_seconds_left"]), "the first one warms up"
    looking.generation(5, {**ROW, "seconds": 3.0, "reward_mean": -0.25})
    now = values(file.read_text())
    measured = {name for name in ROW if name != "digest"}
    assert {
        name.removeprefix("mpies_generation_") for name in now if name.startswith("mpies_generation_")
    } == measured
    assert now["mpies_generations"] == 5 and now["mpies_seconds_left"] == 5 * 3.0
    assert now["mpies_generation_reward_mean"] == -0.25
    assert file.read_text().count("# TYPE ") == file.read_text().count("# HELP ") == len(now)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.prom"]


def test_the_time_left_is_that_on_the_screen(tmp_path, capsys):
    file = tmp_path / "mine.prom"
    looking, screen = monitor([], f"run.metrics={file}"), Screen(False, "lines")
    with screen.progress(0, 10):
        for done, seconds in enumerate((60.0, 2.0, 30.0, 4.0), 1):
            row = {**ROW, "seconds": seconds}
            looking.generation(done, row)
            screen.generation(row)
    assert values(file.read_text())["mpies_seconds_left"] == 6 * 4.0
    assert capsys.readouterr().out.rstrip().endswith("6 left, 24 s")


def test_a_file_that_cannot_be_written_is_refused_at_first_and_said_once_later(tmp_path):
    with pytest.raises(InputError, match=r"run\.metrics: .*No such file"):
        monitor([], f"run.metrics={tmp_path}/none/mine.prom").begin(0)
    said: list[str] = []
    (tmp_path / "there").mkdir()
    looking = monitor(said, f"run.metrics={tmp_path}/there/mine.prom")
    looking.begin(0)
    (tmp_path / "there/mine.prom").unlink()
    (tmp_path / "there").rmdir()
    looking.generation(1, ROW)
    looking.generation(2, ROW)
    assert len(said) == 1 and "run.metrics" in said[0]


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name which notes its arguments, and its exit code in a file."""
    program, log, code = tmp_path / "scontrol", tmp_path / "log", tmp_path / "code"
    program.write_text(f'#!/bin/sh\necho "$@" >>{log}\necho "not allowed" >&2\nexit $(cat {code})\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    code.write_text("0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path


@pytest.mark.parametrize("warm, left", [(False, ""), (True, ", 2 min to go")])
def test_the_comment_is_changed_once_a_minute_and_at_the_end(scontrol, warm, left):
    said: list[str] = []
    looking = monitor(said, "run.slurm_comment=true")
    if warm:
        looking._pace.note(600.0)  # a generation of this job, more than a minute ago
    for done in range(8, 11):
        looking.generation(done, {**ROW, "seconds": 60.0, "reward_mean": 0.25})
    deadline = time.monotonic() + 30
    while (scontrol / "log").read_text().count("\n") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # nobody waits for the last call
    assert (scontrol / "log").read_text().splitlines() == [
        f"update JobId=17 Comment=mpies: generation 8/10, reward 0.25{left}",
        "update JobId=17 Comment=mpies: generation 10/10, reward 0.25",
    ]
    assert said == []


def test_a_site_that_does_not_allow_it_is_said_once(scontrol):
    said: list[str] = []
    (scontrol / "code").write_text("1")
    comments = Comments(said.append)
    for _ in range(3):
        comments.change("so far", last=True)
    assert said == ["warning: run.slurm_comment: not allowed; the job's comment is not changed any more"]
    assert len((scontrol / "log").read_text().splitlines()) == 1


def test_elsewhere_it_has_no_effect(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said: list[str] = []
    looking = monitor(said, "run.slurm_comment=true")
    looking.generation(1, ROW)
    assert said == ["warning: run.slurm_comment: has no effect, this is no Slurm job"]
