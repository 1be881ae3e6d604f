"""Ranks that hang are given up, waiting costs nothing, and rewards that fail do not fail silently."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import h5py
import launching
import numpy as np
import psutil
import pytest

from jobs import ENDLESS, Job, arguments, assert_same_run, committed
from mpies.ranks import collectives

pytestmark = pytest.mark.launch

TIMEOUT = 10  # a machine that many share may stand still for some seconds
# A roll call follows an exchange that does not end. Rank 0 reports first, unless it is the missing one;
# then the others wait 10 seconds more.
GIVEN_UP = 2 * TIMEOUT + 15


def cpu_seconds(processes: list[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


def assert_given_up(job: Job, missing: int) -> None:
    """Soon, by all, with a line that names the missing rank and its host, and no other rank."""
    start = time.monotonic()
    assert job.end(60) not in (0, 2, 75), job.output
    assert time.monotonic() - start < GIVEN_UP
    lines = launching.problems(job.output)
    assert lines, job.output
    said = " ".join(line.split(": ", 1)[1] for line in lines)  # "rank 0: " is who says it
    assert f"rank {missing}" in said and collectives.host() in said and f"{TIMEOUT} s" in said
    assert not any(f"rank {rank}" in said for rank in range(3) if rank != missing)
    assert "Traceback" not in job.output


@pytest.mark.parametrize("missing", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_hangs_is_waited_for_without_spinning_and_given_up(tmp_path, tiny_model, missing):
    settings = arguments(tiny_model(), tmp_path, ENDLESS, run__collective_timeout=TIMEOUT)
    with Job(3, *settings) as job:
        job.wait_for("generation 2/")
        ranks = job.ranks()
        waiting = [rank for number, rank in enumerate(ranks) if number != missing]
        ranks[missing].send_signal(signal.SIGSTOP)
        time.sleep(1)  # the others end what they were at
        before = cpu_seconds(waiting)
        time.sleep(3)
        spent = [after - b for after, b in zip(cpu_seconds(waiting), before, strict=True)]
        assert max(spent) < 0.5, f"CPU seconds of the waiting ranks in 3 s: {spent}"
        assert_given_up(job, missing)
    assert committed(tmp_path) >= 2


def test_a_rank_that_comes_back_in_time_is_no_problem(tmp_path, tiny_model):
    settings = arguments(tiny_model(), tmp_path, ENDLESS, run__collective_timeout=30)
    with Job(2, *settings) as job:
        job.wait_for("generation 2/")
        rank = job.ranks()[1]
        rank.send_signal(signal.SIGSTOP)
        time.sleep(2)
        done = committed(tmp_path)
        rank.send_signal(signal.SIGCONT)
        job.wait_for(f"generation {done + 2}/")


@pytest.mark.long
def test_a_rank_that_hangs_while_it_loads_is_given_up(tmp_path, tiny_model):
    """As on a node whose file system is stuck."""
    settings = arguments(tiny_model(), tmp_path, ENDLESS, run__collective_timeout=TIMEOUT)
    with Job(2, *settings) as job:
        job.wait_for("loading")
        job.ranks()[1].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert job.end(40) not in (0, 2, 75), job.output
        assert time.monotonic() - start < GIVEN_UP + 15  # rank 0 has a model to load
    assert f"rank 1 on {collectives.host()}" in " ".join(launching.problems(job.output))


# The program, with a fault in one rank's driver or memory put in: it stops for ever.
STUCK = """
import os, signal, sys

from mpies.ranks import collectives, devices, launch
from mpies import replica, train
from mpies.model.weights import Weights

function, calls = {owner}.{name}, []

def stuck(*arguments):
    from mpi4py import MPI
    calls.append(1)
    if MPI.COMM_WORLD.rank == 1 and len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGSTOP)
    return function(*arguments)

{owner}.{name} = stuck
launch.run(train.main, sys.argv[1:])
"""


@pytest.mark.parametrize(
    "place, done",
    [pytest.param("replica.device_for 1", 0, marks=pytest.mark.long), ("Weights.update 3", 2)],
    ids=["choosing its device", "updating"],
)
def test_a_rank_that_hangs_in_a_call_is_given_up(tmp_path, tiny_model, place, done):
    where, call = place.split()
    owner, name = where.split(".")
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(owner=owner, name=name, call=call))
    settings = arguments(tiny_model(), tmp_path / "run", ENDLESS, run__collective_timeout=TIMEOUT)
    with Job(2, *settings, program=(script,)) as job:
        job.wait_for(f"generation {done}/" if done else "loading")
        assert_given_up(job, missing=1)
    if done:
        assert committed(tmp_path / "run") == done
    else:
        assert not (tmp_path / "run" / "run.h5").exists()


# The program on a task of the test's own.
TASK = """
import math, sys

from mpies.ranks import collectives, devices, launch
from mpies import train
from mpies.tasks import making
from mpies.tasks.base import Task

def rank():
    from mpi4py import MPI
    return MPI.COMM_WORLD.rank

def characters(completion):
    return sum(map(ord, completion))

calls = []

def reward(prompts, completions, **columns):
    calls.append(1)
    {reward}

rows = [{{"prompt": prompt}} for prompt in ("3 + 5 =", "Can penguins fly?")]
making.make = lambda *_, **__: Task("test", rows, rows, reward)
launch.run(train.main, sys.argv[1:])
"""


def script_with(folder: Path, reward: str) -> Path:
    script = folder / "task.py"
    script.write_text(TASK.format(reward=reward))
    return script


def test_members_that_cannot_be_scored_are_left_out(tmp_path, tiny_model):
    reward = (
        "unknown = [None, math.nan, math.inf, -math.inf]\n"
        "    return [-float(c % 10) if c % 3 else unknown[c % 4] for c in map(characters, completions)]"
    )
    script = script_with(tmp_path, reward)
    folders = [tmp_path / "alone", tmp_path / "together"]
    for ranks, folder in enumerate(folders, 1):
        with Job(ranks, *arguments(tiny_model(), folder, 4), program=(script,)) as job:
            assert job.end() == 0, job.output
    assert_same_run(*folders, 4)
    with h5py.File(folders[0] / "run.h5", "r") as file:
        rewards, coefficients = file["member/reward"][:], file["member/coefficient"][:]
        unscored, mean = file["generation/unscored"][:], file["generation/reward_mean"][:]
    unknown = np.isnan(rewards)
    assert 0 < unknown.sum() < unknown.size
    assert not np.isinf(rewards).any()
    assert (coefficients[unknown] == 0).all()
    assert (coefficients[~unknown] != 0).any() and not np.isnan(coefficients).any()
    assert unscored.tolist() == unknown.sum(axis=1).tolist()
    np.testing.assert_allclose(mean, np.nanmean(rewards, axis=1))


def test_a_generation_of_which_nothing_can_be_scored_stops_the_run(tmp_path, tiny_model):
    script = script_with(tmp_path, "return [None for _ in completions]")
    with Job(2, *arguments(tiny_model(), tmp_path / "run", 4), program=(script,)) as job:
        assert job.end() == 2, job.output
    lines = launching.problems(job.output)
    assert len(lines) == 1 and "could not be scored" in lines[0] and "reward function" in lines[0]
    assert "Traceback" not in job.output and "Warning" not in job.output
    assert committed(tmp_path / "run") == 0


def test_a_reward_that_raises_on_one_rank_ends_all_with_its_traceback(tmp_path, tiny_model):
    reward = (
        "if rank() == 1 and len(calls) == 9:\n"
        "        raise ConnectionError('the judge does not answer')\n"
        "    return [-float(len(c)) for c in completions]"
    )
    script = script_with(tmp_path, reward)
    with Job(2, *arguments(tiny_model(), tmp_path / "run", ENDLESS), program=(script,)) as job:
        job.wait_for("generation 1/")
        start = time.monotonic()
        assert job.end() not in (0, 2, 75)
        assert time.monotonic() - start < 10
    assert job.output.count("Traceback (most recent call last)") == 1
    assert "ConnectionError: the judge does not answer" in job.lines
    assert "rank 1 of 2" in job.output and "task.py" in job.output
    assert committed(tmp_path / "run") >= 1
