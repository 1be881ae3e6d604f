"""What is evaluated: a run or a model, which generation of it, and with which settings."""

from __future__ import annotations

import dataclasses
import fcntl
import re
from pathlib import Path

import pytest
import threads

from mpies import config
from mpies.errors import InputError, RefusedError
from mpies.evaluate.command import parse
from mpies.evaluate.subject import (
    answers_as_trained,
    find_run_file,
    open_subject,
    settings_of,
)
from mpies.runfile import History, read_history


@pytest.fixture
def history(run) -> History:
    return read_history(run.folder / "run.h5")


# Runs and models


def test_a_run_is_a_run_file_or_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    assert find_run_file(str(folder)) is None
    (folder / "run.h5").touch()
    assert find_run_file(str(folder)) == folder / "run.h5" == find_run_file(str(folder / "run.h5"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_run_file("~/run") == folder / "run.h5"
    # A file of another name is one, too, and a name that says so must be there.
    (tmp_path / "copy").touch()
    assert find_run_file(str(tmp_path / "copy")) == tmp_path / "copy"
    for name in ("none.h5", "none.hdf5"):
        assert find_run_file(name) == Path(name)


def test_a_model_is_a_folder_or_a_hub_id(tmp_path):
    assert find_run_file("Qwen/Qwen2.5-3B-Instruct") is None
    assert find_run_file(str(tmp_path)) is None
    # A model's folder in which a run was started.
    for name in ("run.h5", "config.json"):
        (tmp_path / name).touch()
    assert find_run_file(str(tmp_path)) is None


# Generations


@pytest.mark.parametrize("given, generation", [(None, 3), ("last", 3), ("2", 2), ("0", 0)])
def test_the_generation_that_is_meant(run, given, generation):
    options = parse([str(run.folder), *(["--generation", given] if given else [])])
    log, subject = open_subject(run.comm, options)
    assert log is None
    assert subject.generation == subject.run.history.generations == generation
    assert subject.run.path == run.folder / "run.h5"
    assert list(subject.run.history.held_out) == list(range(generation + 1))


def test_the_best_is_by_held_out_reward(run, history):
    _, subject = open_subject(run.comm, parse([str(run.folder), "--generation", "best"]))
    rewards = list(history.held_out.values())
    assert len(set(rewards)) > 1
    assert subject.generation == rewards.index(max(rewards))


@pytest.mark.parametrize("given", ["4", "-1", "frist", ""])
def test_a_generation_that_is_not_there_is_refused(run, given):
    with pytest.raises(RefusedError, match=r"^--generation: given .*, allowed is 0 to 3, last or best"):
        open_subject(run.comm, parse([str(run.folder), f"--generation={given}"]))


def test_a_model_has_no_generation(run, tiny_model):
    log, subject = open_subject(run.comm, parse([str(tiny_model())]))
    assert (log, subject.run, subject.generation) == (None, None, None)
    assert subject.settings.model.path == str(tiny_model())


def test_a_run_file_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(RefusedError, match=r"none\.h5: there is no such file"):
        open_subject(run.comm, parse([str(tmp_path / "none.h5")]))


# The run file, to be written to


def test_the_run_file_is_opened_to_be_written_to(run):
    log, subject = open_subject(run.comm, parse([str(run.folder), "--log", "--generation", "1"]))
    assert log.path == subject.run.path and log.committed == 3, "whichever generation is meant"
    log.close()


def test_a_run_file_in_use_is_refused(run, monkeypatch):
    """By another process; one and the same would get its own lock again."""
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(BlockingIOError))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(
        RefusedError, match=r"^--log: run\.directory: .* is in use by another job; leave it out"
    ):
        open_subject(run.comm, parse([str(run.folder), "--log"]))


# Settings


def test_a_runs_settings_come_along(run, history):
    own = config.from_yaml(history.settings)
    assert settings_of(parse([str(run.folder)]), history) == own
    changed = settings_of(
        parse([str(run.folder), "engine.batch_size=3", "task.eval_data=", "run.threads=2"]), history
    )
    assert changed.engine.batch_size == 3 and changed.run.threads == 2 and changed.task.eval_data == ""
    assert changed.es == own.es and changed.task.reward == own.task.reward


def test_relative_paths_of_an_earlier_versions_run_are_not_looked_for_here(run, history, monkeypatch):
    """Another file would be there, and its code would be run."""
    folder = run.folder.parent
    monkeypatch.chdir(folder)
    (folder / "rewards.py").write_text("raise SystemExit('this must not run')\n")
    text = history.settings.replace("small:reward", "rewards.py:reward")
    old = dataclasses.replace(history, settings=re.sub(r"/\S+/(\w+\.jsonl)", r"\1", text))
    with pytest.raises(InputError) as refused:
        settings_of(parse([str(run.folder)]), old)
    assert str(refused.value) == (
        "task.train_data: the run file says train.jsonl, but not in which folder; name it:"
        " task.train_data=/path/to/train.jsonl"
    )
    named = ["task.train_data=train.jsonl", "task.eval_data="]
    with pytest.raises(InputError, match=r"^task\.reward: the run file says rewards\.py:reward, but not "):
        settings_of(parse([str(run.folder), *named]), old)
    assert settings_of(parse([str(run.folder), *named, "task.reward=small:reward"]), old).task.eval_data == ""


def test_the_live_dtype_is_the_runs_unless_another_is_given(run, history):
    """Where it was auto, it would depend on the device."""
    auto = dataclasses.replace(history, settings=history.settings.replace("dtype: float32", "dtype: auto"))
    assert config.from_yaml(auto.settings).model.dtype == "auto"
    assert settings_of(parse([str(run.folder)]), auto).model.dtype == "float32"
    given = parse([str(run.folder), "model.dtype=bfloat16"])
    assert settings_of(given, auto).model.dtype == "bfloat16"


def test_a_models_settings_are_those_that_are_given(tiny_model, tmp_path):
    (tmp_path / "config.yaml").write_text("engine:\n  max_new_tokens: 7\nrun:\n  directory: x\n")
    options = parse([str(tiny_model()), str(tmp_path / "config.yaml"), "engine.batch_size=3"])
    settings = settings_of(options, None)
    assert (settings.engine.max_new_tokens, settings.engine.batch_size) == (7, 3)
    assert settings.model.path == str(tiny_model())


@pytest.mark.parametrize(
    "given, says",
    [
        (["es.sigma=0.2"], "es.sigma=0.2: what has made the run's weights cannot be changed"),
        (["model.master=live"], "model.master=live: what has made the run's weights cannot be changed"),
        (["other.yaml"], "other.yaml: a run has its own settings; give section.key=value"),
        (["--log", "--initial", "x"], "--log: a run file tells how far its run is from its own initial"),
        (["engine.batch_size=0"], "engine.batch_size: given 0"),
    ],
)
def test_what_cannot_be_asked_of_a_run(run, history, given, says):
    with pytest.raises(InputError) as refused:
        settings_of(parse([str(run.folder), *given]), history)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    "given, says",
    [
        (["--generation", "3"], "--generation: some/model is no run file"),
        (["--log"], "--log: some/model is no run file"),
        (["--kl"], "--kl and --drift: name the model to compare with, by --initial"),
        (["--drift"], "--kl and --drift: name the model to compare with, by --initial"),
    ],
)
def test_what_cannot_be_asked_of_a_model(given, says):
    with pytest.raises(InputError) as refused:
        settings_of(parse(["some/model", *given]), None)
    assert str(refused.value).startswith(says)
    if given[0] in ("--kl", "--drift"):
        assert settings_of(parse(["some/model", *given, "--initial", "x"]), None)


@pytest.mark.parametrize(
    "given, alike",
    [
        ([], True),
        (["engine.batch_size=3"], False),
        (["engine.max_new_tokens=3"], False),
        (["task.chat_template=false"], False),
        (["task.train_size=1"], False),
        (["model.dtype=bfloat16"], False),
        (["run.threads=2"], False),
        # The data's digest is compared elsewhere.
        (["task.eval_data=elsewhere.jsonl"], True),
        (["run.keep_samples=1"], True),
        (["model.path=elsewhere"], True),
    ],
)
def test_figures_stand_beside_the_runs_own_if_answers_are_found_as_in_training(run, history, given, alike):
    settings = settings_of(parse([str(run.folder), *given]), history)
    assert answers_as_trained(settings, history, {}) == alike


def test_figures_of_another_reward_do_not_stand_beside_the_runs_own(run, history):
    settings = settings_of(parse([str(run.folder)]), history)
    assert answers_as_trained(settings, history, history.reward_digests)
    assert not answers_as_trained(settings, history, {"small:reward": "f" * 64})


def test_ranks_that_see_other_settings_are_refused(run):
    def see(comm):
        given = [str(run.folder), f"engine.batch_size={5 + comm.rank}"]
        return open_subject(comm, parse(given))

    errors = threads.run(2, see)
    assert all(isinstance(error, RefusedError) for error in errors)
    assert "settings differ between ranks: engine.batch_size is 5 on rank 0" in str(errors[0])
