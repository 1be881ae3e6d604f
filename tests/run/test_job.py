"""What surrounds the generations: set up, gone on with, left and finished."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial

import h5py
import numpy as np
import pytest
import small
import threads
import torch
from transformers import AutoModelForCausalLM

from mpies import config
from mpies.errors import RefusedError
from mpies.run.job import Job
from mpies.run.stopping import Stop
from mpies.runfile import open_for_reading

UINT = np.array([5], np.uint64), np.array([0.1], np.float32)


def attributes(runs: small.Runs) -> tuple[dict, dict[str, list]]:
    """The run file's attributes, and its /start."""
    with open_for_reading(runs.folder / "run.h5") as file:
        start = {
            name: (column.asstr() if h5py.check_string_dtype(column.dtype) else column)[:].tolist()
            for name, column in file["start"].items()
        }
        return dict(file.attrs), start


def test_a_new_run_is_noted_with_all_that_it_depends_on(runs, capsys):
    job = runs.begin(3, es__fitness="centered_rank")
    noted, start = attributes(runs)
    facts = job.replica.facts
    expected = {
        "population": 4,
        "generations_committed": 0,
        "model_path": str(runs.model),
        "model_digest": job.replica.weights.digest(),
        "parameters": sum(base.numel() for base in job.replica.weights.base.values()),
        "dtype": "float32",
        "data_digest": job.task.digest,
        "fitness": "centered_rank",
    }
    assert {name: noted[name] for name in expected} == expected
    assert facts.model_digest == expected["model_digest"] and facts.parameters == expected["parameters"]
    assert (start["generation"], start["world_size"], start["reason"]) == ([0], [1], ["new"])
    assert (start["hosts"], start["devices"]) == ([os.uname().nodename], ["cpu"])
    assert json.loads(start["versions"][0])["torch"] == torch.__version__
    assert (job.first, job.evaluated, list(job.generation_seconds)) == (0, set(), [])
    assert job.advisor.unperturbed is None
    assert "run file" in capsys.readouterr().out


def test_a_job_that_goes_on_knows_where_it_was(again):
    with open_for_reading(again.folder / "run.h5") as file:
        digest, seconds = file["generation/digest"][3], file["generation/seconds"][:4].tolist()
        table = file["evaluation"]
        last = (table["generation"][:] == 4) & (table["split"].asstr()[:] == "train")
        (reward,) = table["reward_mean"][last]
    job = again.begin(9)
    assert (job.first, job.log.committed) == (4, 4)
    assert job.replica.weights.digest() == digest
    assert job.evaluated == {(g, split) for g in (0, 2, 4) for split in ("train", "held_out")}
    assert list(job.generation_seconds) == seconds
    assert job.advisor.unperturbed == reward
    _, start = attributes(again)
    assert (start["generation"], start["reason"]) == ([0, 4], ["new", "resumed"])


def test_the_last_five_generations_tell_how_long_one_takes(runs):
    short = {"es__population": 2, "engine__max_new_tokens": 1}
    assert runs.train(7, **short) == 0
    with open_for_reading(runs.folder / "run.h5") as file:
        seconds = file["generation/seconds"][:7].tolist()
    assert list(runs.begin(8, **short).generation_seconds) == seconds[2:]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"run__resume": "must"}, "run.resume: must"),
        ({"task__reward": "small:none"}, "task.reward: small has no function 'none'"),
        (
            {"run__time_limit": "auto", "task__train_data": "none.jsonl"},
            "task.train_data: none.jsonl: there is no",
        ),
    ],
)
def test_bad_input_is_refused_before_a_model_is_looked_for(runs, changes, says):
    with pytest.raises(RefusedError) as refused:
        runs.begin(3, model__path="./none", **changes)
    assert str(refused.value).startswith(says)
    assert not runs.folder.exists()


def test_other_data_are_refused_before_a_model_is_looked_for(again):
    for path in again.folder.parent.glob("*.jsonl"):
        path.write_text('{"prompt": "another"}\n')
    with pytest.raises(RefusedError, match=r"^task\.train_data: the data, .* in another"):
        again.begin(5, model__path="./none")


def test_another_dtype_is_refused(again):
    with pytest.raises(
        RefusedError, match=r"^model\.dtype: the run was begun with float32, but here .* bfloat16"
    ):
        again.begin(5, model__dtype="bfloat16")


def test_the_job_script_is_told_when_signals_are_heard(runs, monkeypatch):
    monkeypatch.setenv("MPIES_LISTENING", str(runs.folder.parent / "listening"))
    runs.begin(1)
    told = runs.folder.parent / "listening"
    assert told.read_text() == "", "not complete yet"


def test_the_job_script_is_told_when_the_run_is_complete(runs, monkeypatch):
    told = runs.folder.parent / "listening"
    monkeypatch.setenv("MPIES_LISTENING", str(told))
    assert runs.train(1) == 0
    assert told.read_text() == f"{runs.folder / 'run.h5'}\n"


# How much time there is


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def job(runs) -> Job:
    """With a time limit of 100 seconds and a clock, which stands still, as its `stop._clock`."""
    made = runs.begin(3)
    made.stop = Stop(100, 30, Clock())
    return made


@pytest.mark.parametrize("seconds, stops", [([], False), ([1.0, 60.0, 2.0], False), ([1.0, 90.0, 2.0], True)])
def test_the_slowest_of_the_latest_generations_has_to_fit(job, seconds, stops):
    job.generation_seconds.extend(seconds)
    assert job.wants_to_stop() == stops
    assert job.agree_to_stop() == stops
    assert job.stop.reason == ("the time limit" if stops else "")


def test_only_the_latest_five_generations_count(job):
    for seconds in (90, 1, 2, 3, 4):
        job.generation_seconds.append(seconds)
    assert job.wants_to_stop()
    job.generation_seconds.append(5)
    assert not job.wants_to_stop()


def test_all_blocks_that_are_left_have_to_fit(job):
    assert job.has_time_for(1000), "nothing is known yet"
    job.block_seconds.extend([5.0, 10.0, 7.0])
    assert job.has_time_for(7)  # 7 blocks of 10 s, times 1.2, and 5 s to leave: 89 of 100 s
    assert not job.has_time_for(8)
    for _ in range(32):
        job.block_seconds.append(1.0)
    assert job.has_time_for(70)


# Checkpoints, the anchor


def test_checkpoints_are_written_every_so_many_generations(runs):
    job = runs.begin(9)
    for every, written in [(0, []), (3, [3]), (2, [2, 4]), (1, [3, 4])]:
        job.settings = config.load(runs.arguments(9, run__checkpoint_every=every))
        for generation in range(1, 5):
            job.save_checkpoint_if_due(generation)
        found = sorted(runs.folder.glob("checkpoint*"))
        assert [path.name for path in found] == [f"checkpoint-{g:06d}.safetensors" for g in written]
        for path in found:
            path.unlink()


def test_a_pull_brings_every_parameter_nearer_to_its_initial_value(runs):
    assert runs.begin(1).replica.anchor is None
    job = runs.begin(2, run__directory=runs.folder.with_name("anchored"), es__anchor_decay=0.25)
    weights = job.replica.weights
    initial = {name: base.clone() for name, base in weights.base.items()}
    weights.update(*UINT)
    moved = {name: base.clone() for name, base in weights.base.items()}
    weights.update(np.empty(0, np.uint64), np.empty(0, np.float32), job.replica.anchor.pulling(0.25))
    for name, base in weights.base.items():
        assert torch.equal(base, moved[name] + 0.25 * (initial[name] - moved[name])), name


# The end


def test_what_is_saved_is_the_base_whatever_was_evaluated_last(runs, capsys):
    job = runs.begin(0)
    job.replica.weights.update(*UINT)
    job.replica.perturbation.set(job.population.members(0)[:1], 0.5)
    job.finish()
    tuned = AutoModelForCausalLM.from_pretrained(runs.folder / "model")
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, job.replica.weights.base[name]), name
    origin = json.loads((runs.folder / "model" / "mpies.json").read_text())
    uuid = attributes(runs)[0]["run_uuid"]
    digest = f"{job.replica.weights.digest():016x}"
    assert origin == {"run_uuid": uuid, "generation": 0, "digest": digest}
    assert not job.log.file, "the run file is closed"
    assert "tuned model: " in capsys.readouterr().out


def test_leaving_early_says_whose_reason_it_was(runs, capsys):
    job = runs.begin(7)

    def leave(comm, reasons):
        mine = dataclasses.replace(job, comm=comm, log=None, stop=Stop(None, 30))
        mine.stop.reason = reasons[comm.rank]
        mine.leave(3)

    for reasons, why in [
        (("signal SIGUSR1", "", ""), "signal SIGUSR1"),
        (("", "", "signal SIGTERM"), "signal SIGTERM (rank 2 on gamma)"),
        (("", "the time limit", "signal SIGINT"), "the time limit (rank 1 on beta)"),
        (("the time limit",) * 3, "the time limit"),
    ]:
        capsys.readouterr()
        threads.run(3, partial(leave, reasons=reasons), hosts=("alpha", "beta", "gamma"))
        lines = set(capsys.readouterr().out.splitlines())
        assert lines == {f"stopped by {why} after generation 3 of 7; the same command goes on from there"}
    job.stop.reason = "the time limit"
    job.leave(3)
    assert not job.log.file, "the run file is closed"
