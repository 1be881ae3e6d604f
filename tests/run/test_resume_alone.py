"""Going on with a run, on one rank and in this process: found, checked, brought back, or refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import small
import threads
import torch

from mpies import config
from mpies.errors import RefusedError
from mpies.replica import Replica
from mpies.run import continuity, resume
from mpies.runfile import History, RunFile, read_history

HOSTS = ("alpha", "beta")


def found(runs: small.Runs, generations: int = 4, **changes) -> tuple[RunFile | None, History | None]:
    """What `find` finds; the file is closed again."""
    settings = config.load(runs.arguments(generations, **changes))
    log, history = resume.find(runs.comm, settings, runs.folder / "run.h5")
    if log:
        log.close()
    return log, history


def refused(function, *arguments, **named) -> str:
    with pytest.raises(RefusedError) as error:
        function(*arguments, **named)
    return str(error.value)


@pytest.mark.parametrize("how", ["auto", "never"])
def test_where_there_is_no_run_there_is_nothing_to_go_on_with(runs, how):
    assert found(runs, run__resume=how) == (None, None)
    assert not runs.folder.exists()


def test_a_run_that_must_be_there(runs, again):
    assert found(again, run__resume="must")[1].generations == 4
    (again.folder / "run.h5").unlink()
    said = refused(found, again, run__resume="must")
    assert said == f"run.resume: must, but there is no {again.folder / 'run.h5'}"


def test_a_name_that_is_too_long_for_the_file_system(runs):
    runs.folder = runs.folder / ("d" * 300)
    said = refused(found, runs)
    assert said.startswith("run.directory: ") and "too long" in said and len(said) < 300
    assert not runs.folder.parent.exists()


def test_a_run_that_must_not_be_there(again):
    said = refused(found, again, run__resume="never")
    assert said.startswith(f"run.directory: {again.folder / 'run.h5'} exists already; ")


@pytest.mark.parametrize("below", ["here", "deep/down/here"])
def test_a_directory_that_cannot_be_made_is_refused(runs, below):
    blocked = runs.folder
    blocked.write_text("a file")
    runs.folder = blocked / below
    assert refused(found, runs) == f"run.directory: cannot write to {blocked}"


def test_the_history_is_that_of_the_file(again):
    log, history = found(again, 9)
    read = read_history(again.folder / "run.h5")
    assert log is not None
    for field in dataclasses.fields(History):
        mine, theirs = getattr(history, field.name), getattr(read, field.name)
        assert (mine == theirs).all() if hasattr(mine, "shape") else mine == theirs, field.name


def test_other_settings_and_fewer_generations_are_refused(again):
    said = refused(found, again, es__sigma=0.2, es__seed=1)
    assert said.splitlines()[:2] == [
        "es.sigma: the run was begun with 0.3, not 0.2",
        "es.seed: the run was begun with 42, not 1",
    ]
    assert found(again, 4)[1] is not None
    said = refused(found, again, 3)
    assert said.startswith("es.generations: given 3, but the run file holds 4 already; ")


def test_rank_0_alone_opens_the_file_and_all_know_what_is_in_it(again):
    settings = config.load(again.arguments(4))
    path = again.folder / "run.h5"
    (log, mine), (none, theirs) = threads.run(2, lambda comm: resume.find(comm, settings, path))
    log.close()
    assert none is None
    assert theirs.digest.tolist() == mine.digest.tolist() and theirs.evaluated == mine.evaluated


def test_other_data_are_refused(finished):
    history = read_history(finished / "run.h5")
    continuity.refuse_other_data(history, history.data_digest)
    said = refused(continuity.refuse_other_data, history, 64 * "f")
    assert said.startswith("task.train_data: ") and 16 * "f" in said and history.data_digest[:16] in said
    old = dataclasses.replace(history, data_digest="")
    continuity.refuse_other_data(old, 64 * "f")


def test_another_live_dtype_is_refused(finished):
    history = read_history(finished / "run.h5")
    continuity.refuse_other_dtype(history, "float32")
    said = refused(continuity.refuse_other_dtype, history, "bfloat16")
    assert said == (
        "model.dtype: the run was begun with float32, but here it would be bfloat16; set model.dtype=float32"
    )


# Bringing the base back


@pytest.fixture
def history(again) -> History:
    return read_history(again.folder / "run.h5")


def restored(runs, made: Replica, history: History) -> list[str]:
    """What is said while the base is brought to the history's last generation; it is proved to be that."""
    said: list[str] = []
    resume.restore(runs.comm, made, history, runs.folder, said.append)
    assert made.weights.digest() == int(history.digest[-1])
    return said


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "generations, damaged, origin",
    [
        (4, [], "checkpoint 4"),
        (3, [], "checkpoint 2"),
        (1, [], "the initial model"),
        (4, [4], "checkpoint 2"),
        (4, [4, 2], "the initial model"),
    ],
)
def test_a_checkpoint_then_replay(again, history, generations, damaged, origin):
    for number in damaged:
        damage(again.folder / f"checkpoint-{number:06d}.safetensors")
    *skipped, line = restored(again, again.build(), history.first(generations))
    assert [text.split(":")[0] for text in skipped] == [f"checkpoint-{n:06d}.safetensors" for n in damaged]
    assert re.fullmatch(
        rf"resuming after generation {generations}, replayed from {origin} in \d+\.\d s", line
    )


def test_before_the_first_generation_there_is_nothing_to_do(again, history):
    made, said = again.build(), []
    resume.restore(again.comm, made, history.first(0), again.folder, said.append)
    assert said == [] and made.weights.digest() == history.model_digest


def test_another_initial_model_is_refused(again, history, tiny_model):
    other = again.build(model__path=tiny_model(seed=1))
    said = refused(restored, again, other, history)
    assert said.startswith(f"model.path: {tiny_model(seed=1)} has digest ")
    assert f"{other.facts.model_digest:016x}" in said and f"{history.model_digest:016x}" in said
    # Also if there is nothing to replay.
    assert refused(resume.restore, again.comm, other, history.first(0), again.folder) == said


@pytest.mark.parametrize("change", ["a flipped bit", "a changed reward", "a changed digest"])
def test_a_result_that_is_not_the_files_digest_is_refused(again, history, change):
    made = again.build()
    for path in again.folder.glob("checkpoint-*"):
        path.unlink()
    if change == "a flipped bit":  # after loading, as memory errors do
        list(made.weights.base.values())[-1].view(torch.int32).view(-1)[0] ^= 1
    elif change == "a changed reward":
        history.reward[1, 2] += 0.5
    else:
        history.digest[-1] ^= 1
    said = refused(resume.restore, again.comm, made, history, again.folder)
    assert said.startswith("run.directory: replaying 4 generations gives digest ")
    assert f"{int(history.digest[-1]):016x}" in said and "--verify" in said


def test_a_changed_digest_in_the_middle_does_not_matter(again, history):
    for path in again.folder.glob("checkpoint-*"):
        path.unlink()
    history.digest[1] ^= 1
    restored(again, again.build(), history)


def test_a_rank_that_cannot_read_the_checkpoint_replays_and_is_named(again, history):
    """As where a node does not see the directory."""
    replicas, said = [again.build(), again.build()], [[], []]
    folders = [again.folder, again.folder / "nowhere"]

    def restore(comm):
        rank = comm.rank
        resume.restore(comm, replicas[rank], history, folders[rank], said[rank].append)
        return replicas[rank].weights.digest()

    assert threads.run(2, restore, hosts=HOSTS) == [int(history.digest[-1])] * 2
    for line, last in said:
        assert line.startswith("rank 1 on beta cannot read checkpoint 4 of run.directory")
        assert "replayed from " in last
