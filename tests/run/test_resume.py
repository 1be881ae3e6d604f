"""A run that was interrupted goes on as if nothing had happened, or is refused with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import launching
import made_up
import pytest

from jobs import (
    ENDLESS,
    Job,
    arguments,
    assert_same_model,
    assert_same_run,
    committed,
    refused,
    train,
)
from mpies import config

pytestmark = pytest.mark.launch

FEW, MANY = 8, 10

FEW, MANY = 8, 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model) -> Path:
    """A run of MANY generations that was left alone, on 2 ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(2, *arguments(tiny_model(), folder, MANY))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_model) -> tuple[Path, int]:
    """A run of FEW generations, killed on 2 ranks, ended on 3; and how many there were in between."""
    folder = tmp_path_factory.mktemp("killed")
    settings = arguments(tiny_model(), folder, FEW, run__checkpoint_every=2)
    with Job(2, *settings) as job:
        job.wait_for("generation 3/")
        job.kill()
    before = committed(folder)
    assert 3 <= before < FEW, "the kill came too late"
    output = train(3, *settings)
    assert f"resuming after generation {before}, replayed from checkpoint 2" in output
    return folder, before


@pytest.fixture
def run(killed, tmp_path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(killed[0], tmp_path / "run"))


# Going on


def test_a_killed_run_goes_on_as_if_nothing_had_happened(killed, uninterrupted):
    folder, _ = killed
    assert committed(folder) == FEW
    assert_same_run(folder, uninterrupted, FEW)


def test_every_start_is_noted(killed):
    folder, before = killed
    with h5py.File(folder / "run.h5", "r") as file:
        start = {name: column[:].tolist() for name, column in file["start"].items()}
        texts = [file["config"][name].asstr()[()] for name in sorted(file["config"])]
    assert start["generation"] == [0, before]
    assert start["world_size"] == [2, 3]
    assert start["reason"] == [b"new", b"resumed"]
    assert [len(hosts.split(b",")) for hosts in start["hosts"]] == [2, 3]
    assert [config.from_yaml(text).es.generations for text in texts] == [FEW, FEW]


def test_more_generations_make_the_longer_run(run, tiny_model, uninterrupted):
    output = train(1, *arguments(tiny_model(), run, MANY))
    assert f"generation {MANY}/{MANY}" in output
    assert f"generation {FEW}/" not in output
    assert_same_run(run, uninterrupted, MANY)
    assert_same_model(run, uninterrupted)


def test_a_finished_run_ends_well_again_also_with_a_moved_model(run, killed, tiny_model, tmp_path):
    moved = shutil.copytree(tiny_model(), tmp_path / "moved")
    output = train(1, *arguments(moved, run, FEW))
    assert not any(line.startswith("generation ") for line in output.splitlines())
    assert_same_run(run, killed[0], FEW)
    assert_same_model(run, killed[0])


def test_an_evaluation_that_a_kill_prevented_is_made_up_for_and_no_other(run, tiny_model, uninterrupted):
    """Killed after the last commit, with the training prompts evaluated but not the held-out ones."""
    with h5py.File(run / "run.h5", "r+") as file:
        for table in ("evaluation", "metric", "sample", "prompt"):
            columns = file[table]
            kept = (columns["generation"][:] < FEW) | (columns["split"].asstr()[:] == "train")
            assert not kept.all()
            for column in columns.values():
                rows = column[:][kept]
                column.resize(len(rows), axis=0)
                column[:] = rows
    train(1, *arguments(tiny_model(), run, FEW))
    assert_same_run(run, uninterrupted, FEW)


def test_rows_that_were_not_committed_do_not_count(run, tiny_model, uninterrupted):
    """Killed in the middle of writing generation 7. Also, the latest checkpoint is damaged."""
    with h5py.File(run / "run.h5", "r+") as file:
        file.attrs.modify("generations_committed", 6)
        for table in ("generation", "member"):
            for column in file[table].values():
                column[6:] = 77
        for table in ("evaluation", "metric", "sample", "prompt"):
            kept = int((file[table]["generation"][:] <= 6).sum())
            for column in file[table].values():
                column.resize(kept, axis=0)
    (run / "checkpoint-000006.safetensors").write_bytes(b"damaged")
    output = train(2, *arguments(tiny_model(), run, FEW))
    assert output.count("checkpoint-000006.safetensors: ") == 1
    assert "resuming after generation 6, replayed from the initial model" in output
    assert_same_run(run, uninterrupted, FEW)


# Refused, with the file as it was


def test_other_settings_are_refused_with_what_may_change(run, tiny_model):
    before = (run / "run.h5").read_bytes()
    settings = arguments(tiny_model(), run, MANY, es__sigma=0.2, engine__max_new_tokens=8)
    with Job(2, *settings) as job:
        assert job.end() == 2
    problems = launching.problems(job.output)
    assert len(problems) == 3, job.output
    assert problems[0] == "es.sigma: the run was begun with 0.3, not 0.2"
    assert problems[1] == "engine.max_new_tokens: the run was begun with 16, not 8"
    for key in config.CHANGEABLE:
        assert key in problems[2]
    assert "run.directory" in problems[2] and "Traceback" not in job.output
    assert (run / "run.h5").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"run__resume": "never"}, ["run.directory", "exists already", "run.resume"]),
        ({"es__generations": FEW - 1}, ["es.generations", f"given {FEW - 1}", f"holds {FEW}"]),
    ],
    ids=["never", "fewer generations"],
)
def test_what_is_there_can_stand_in_the_way(run, tiny_model, changes, words):
    before = (run / "run.h5").read_bytes()
    (line,) = refused(*arguments(tiny_model(), run, FEW, **changes))
    for word in words:
        assert word in line
    assert (run / "run.h5").read_bytes() == before


@pytest.mark.long
def test_a_tuned_model_that_would_have_no_place_is_refused_at_the_start(tmp_path, tiny_model):
    """It would be lost at the end, and at every resumption again; the check says so, too."""
    shutil.copytree(tiny_model(), tmp_path / "own" / "model")
    (tmp_path / "taken" / "model").mkdir(parents=True)
    (tmp_path / "taken" / "model" / "thesis.txt").write_text("dear to somebody")
    for folder, model, word in (
        (tmp_path / "own", tmp_path / "own" / "model", "where the initial model is"),
        (tmp_path / "taken", tiny_model(), "holds other things already"),
    ):
        words = arguments(model, folder, FEW)
        (line,) = refused(*words)
        assert line.startswith("run.directory: ") and word in line
        assert not (folder / "run.h5").exists()
        checked = launching.python("-m", "mpies.check", *words)
        assert checked.returncode == 2 and word in checked.stderr


def test_what_must_be_there_is_missing(tiny_model, tmp_path):
    (line,) = refused(*arguments(tiny_model(), tmp_path / "nothing", FEW, run__resume="must"))
    assert "run.resume: must" in line and str(tmp_path / "nothing") in line
    assert not (tmp_path / "nothing").exists()


def test_another_model_is_refused(run, tiny_model):
    before = (run / "run.h5").read_bytes()
    other = tiny_model(seed=1)
    (line,) = refused(*arguments(other, run, MANY))
    with h5py.File(run / "run.h5", "r") as file:
        right = int(file.attrs["model_digest"])
    assert line.startswith("model.path: ") and str(other) in line and f"{right:016x}" in line
    assert (run / "run.h5").read_bytes() == before


@pytest.mark.parametrize(
    "sealed, words",
    [(False, ["damaged: generation 2; generations 1 to 1 are good"]), (True, ["digest", "--verify"])],
    ids=["by accident", "with its checksum"],
)
def test_rows_that_were_changed_are_refused(run, tiny_model, sealed, words):
    with h5py.File(run / "run.h5", "r+") as file:
        file["member/reward"][1, 1] = 0.25
        if sealed:
            made_up.seal_all(file)
    before = (run / "run.h5").read_bytes()
    for checkpoint in run.glob("checkpoint-*"):
        checkpoint.unlink()
    (line,) = refused(*arguments(tiny_model(), run, MANY))
    assert all(word in line for word in words)
    assert (run / "run.h5").read_bytes() == before


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[:-500], ["its end is missing", "mpies.replay"]),
        (lambda data: b"not HDF5 at all\n", ["not a readable HDF5 file"]),
        (lambda data: data[:100] + bytes(2000) + data[2100:], []),
    ],
    ids=["truncated", "text", "zeroed"],
)
def test_a_damaged_file_is_refused_and_left_alone(run, tiny_model, damage, words):
    damaged = damage((run / "run.h5").read_bytes())
    (run / "run.h5").write_bytes(damaged)
    (line,) = refused(*arguments(tiny_model(), run, MANY))
    assert str(run / "run.h5") in line
    for word in words:
        assert word in line
    assert (run / "run.h5").read_bytes() == damaged
    assert not list(run.glob("*.partial"))


# Two jobs, one directory


def test_a_directory_in_use_is_refused_and_its_job_not_disturbed(tiny_model, tmp_path, uninterrupted):
    settings = arguments(tiny_model(), tmp_path, ENDLESS)
    with Job(1, *settings) as first:
        first.wait_for("generation 2/")
        (line,) = refused(*settings)
        assert "in use by another job" in line and str(tmp_path) in line
        seen = len(first.lines)
        first.wait_for(f"generation {committed(tmp_path) + 2}/")
        assert len(first.lines) > seen
    assert_same_run(tmp_path, uninterrupted, FEW)


def test_of_two_jobs_that_start_at_once_one_gets_the_directory(tiny_model, tmp_path, uninterrupted):
    """As when a job is submitted twice: both find an empty directory, and load the model."""
    settings = arguments(tiny_model(), tmp_path, MANY)
    with Job(1, *settings) as one:
        one.wait_for("loading")
        (first,) = one.ranks()
        first.suspend()  # until the other has found the directory empty, too
        with Job(1, *settings) as two:
            two.wait_for("loading")
            first.resume()
            codes = sorted([one.end(), two.end()])
    assert codes == [0, 2], one.output + two.output
    assert_same_run(tmp_path, uninterrupted, MANY)
