"""Evaluations between the generations: when, of what, and what of it the run file gets."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
import small
import torch

from mpies.measure.drift import measure_drift
from mpies.measure.evaluation import FIRST_HELD_OUT, Sampling, evaluate_rows
from mpies.measure.kl import estimate_kl
from mpies.run import milestones
from mpies.run.job import Job
from mpies.run.milestones import is_due
from mpies.runfile import open_for_reading
from mpies.tasks.base import TrainerState
from mpies.time_limit import OutOfTimeError

MOVE = np.array([5], np.uint64), np.array([0.1], np.float32)


@pytest.mark.parametrize(
    "every, last, due",
    [
        (0, 10, [0, 10]),
        (1, 4, [0, 1, 2, 3, 4]),
        (3, 10, [0, 3, 6, 9, 10]),
        (5, 10, [0, 5, 10]),
        (20, 10, [0, 10]),
        (3, 0, [0]),
    ],
)
def test_the_first_the_last_and_every_so_many_are_due(every, last, due):
    assert [generation for generation in range(last + 1) if is_due(generation, every, last)] == due


def table(job: Job, name: str) -> list[dict]:
    """The rows of a table of the run file, after a generation's evaluation."""
    with open_for_reading(job.log.path) as file:
        columns = {
            key: (column.asstr() if h5py.check_string_dtype(column.dtype) else column)[:].tolist()
            for key, column in file[name].items()
        }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_what_is_logged_is_what_the_unperturbed_model_answers(runs):
    job = runs.begin(9, run__evaluate_every=3, run__keep_samples=1)
    replica = job.replica
    replica.weights.update(*MOVE)
    replica.perturbation.set(job.population.members(0)[:1], 0.5)
    job.evaluate_if_due(3)
    assert [call["trainer_state"] for call in small.calls] == [TrainerState(3, 9)] * 2
    assert all(torch.equal(live, replica.weights.base[n]) for n, live in replica.weights.live.items())
    rows = {row["split"]: row for row in table(job, "evaluation")}
    samples = {row["split"]: row for row in table(job, "sample")}
    assert set(rows) == set(samples) == {"train", "held_out"}
    for split, given in job.task.splits.items():
        answers = replica.engine.generate([row["prompt"] for row in given])
        rewards = list(map(small.score, answers.texts))
        assert rows[split]["generation"] == samples[split]["generation"] == 3
        assert rows[split]["reward_mean"] == math.fsum(rewards) / len(rewards)
        assert rows[split]["tokens"] == sum(answers.tokens)
        assert rows[split]["answer_tokens"] == sum(answers.tokens) / len(given)
        assert math.isnan(rows[split]["kl"]) and math.isnan(rows[split]["drift_l2"])
        assert samples[split]["completion"] == answers.texts[0] and samples[split]["reward"] == rewards[0]
        assert samples[split]["prompt"] == given[0]["prompt"]
    assert job.advisor.unperturbed == rows["train"]["reward_mean"]


def test_only_what_is_due_and_not_in_the_file_is_evaluated(runs):
    job = runs.begin(9, run__evaluate_every=3)
    for generation in (1, 2, 4, 8):
        job.evaluate_if_due(generation)
    assert small.calls == []
    job.evaluated = {(6, "train"), (6, "held_out"), (3, "train")}
    job.evaluate_if_due(6)
    assert small.calls == [] and job.advisor.unperturbed is None
    job.evaluate_if_due(3)
    assert [call["prompts"] for call in small.calls] == [[row["prompt"] for row in small.HELD_OUT]]
    assert [(row["generation"], row["split"]) for row in table(job, "evaluation")] == [(3, "held_out")]
    job.evaluate_if_due(9)
    assert len(small.calls) == 3


def test_a_run_that_goes_on_evaluates_what_is_missing_and_no_more(again):
    """Of a run that was to end after generation 4, but now goes on, and is evaluated every 2."""
    job = again.begin(8, run__evaluate_every=2)
    job.evaluate_if_due(4)
    assert small.calls == []
    job.evaluate_if_due(6)
    assert len(small.calls) == 2 and len(table(job, "evaluation")) == 6 + 2


@pytest.fixture
def measured(runs):
    """measured(**changes): a job whose base has moved, after its evaluation of generation 3."""

    def begin(**changes) -> Job:
        job = runs.begin(
            3, **{"run__kl_samples": 3, "run__kl_prompts": 1, "run__measure_drift": True} | changes
        )
        job.replica.weights.update(*MOVE)
        job.evaluate_if_due(3)
        return job

    return begin


def test_kl_is_measured_on_the_first_held_out_prompts_and_drift_on_all_weights(measured):
    job = measured(es__seed=17)
    replica, comm = job.replica, job.comm
    rows = {row["split"]: row for row in table(job, "evaluation")}
    assert math.isnan(rows["train"]["kl"])
    batch, held_out = job.settings.engine.batch_size, job.task.held_out[:1]
    sampling = Sampling(3, 1.0, 17, FIRST_HELD_OUT)
    expected = estimate_kl(comm, replica, replica.initial, held_out, batch, sampling)
    assert rows["held_out"]["kl"] == expected.mean > 0
    drift = measure_drift(comm, replica, replica.initial)
    assert rows["train"]["drift_l2"] == rows["held_out"]["drift_l2"] == drift["all"] > 0
    metrics = {row["name"]: row["mean"] for row in table(job, "metric") if row["split"] == "train"}
    assert metrics == {f"drift_l2 {group}": far for group, far in drift.items() if group != "all"}


def test_without_time_for_kl_its_evaluation_is_for_the_next_start(runs):
    job = runs.begin(3, run__kl_samples=3, run__kl_prompts=1, engine__batch_size=1)
    asked = []

    def has_time(seconds: float, batches: int) -> bool:
        asked.append(batches)
        return len(asked) <= len(job.task.train) + len(job.task.held_out) + 1

    made = milestones.evaluate(job.comm, job.replica, job.settings, 3, list(job.task.splits), has_time)
    assert next(made).split == "train"
    with pytest.raises(OutOfTimeError):
        next(made)
    assert asked[-2:] == [6, 5], "three answers, which are read twice more"


def test_without_held_out_prompts_kl_is_measured_on_training_prompts(measured, runs):
    job = measured(task__eval_data="", es__seed=17)
    (row,) = table(job, "evaluation")
    batch, replica = job.settings.engine.batch_size, job.replica
    sampling = Sampling(3, 1.0, 17, 0)
    assert (row["split"], row["kl"]) == (
        "train",
        estimate_kl(job.comm, replica, replica.initial, job.task.train[:1], batch, sampling).mean,
    )


@pytest.mark.parametrize(
    "changes, measures",
    [
        ({"run__kl_samples": 0}, (False, True)),
        ({"run__measure_drift": False}, (True, False)),
    ],
)
def test_only_what_is_set_is_measured(measured, changes, measures):
    job = measured(**changes)
    row = {row["split"]: row for row in table(job, "evaluation")}["held_out"]
    assert (not math.isnan(row["kl"]), not math.isnan(row["drift_l2"])) == measures


def test_the_evaluation_is_evaluate_rows_with_the_settings_batches(runs):
    job = runs.begin(3, engine__batch_size=1)
    job.evaluate_if_due(0)
    assert [len(call["prompts"]) for call in small.calls] == [1, 1, 1]
    found = evaluate_rows(job.comm, job.replica.engine, job.task, job.task.train, 1)
    assert table(job, "evaluation")[0]["reward_mean"] == found.reward_mean
