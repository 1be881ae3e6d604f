"""Blocks that are handed out: each to one rank, whatever the others are at. On any number of ranks."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from mpies import config, train
from mpies.es.population import Population
from mpies.phases import Phases
from mpies.ranks import collectives, handout
from mpies.ranks.handout import Handout
from mpies.run.assignment import WITHOUT, Assignment
from mpies.runfile import open_for_reading

pytestmark = pytest.mark.mpi


@pytest.fixture
def handed(world):
    collectives.set_timeout(world, 60)
    made = Handout(world)
    yield made
    collectives.barrier(world)
    made.end()


def draw_all(handed: Handout, number: int, count: int) -> list[int]:
    mine = [handed.comm.rank]
    while (drawn := handed.draw(number, count)) is not None:
        mine.append(drawn)
    return mine


def test_every_number_is_given_once_and_known_by_all(world, handed):
    assert handed.works()
    for number in range(5):  # round after round, without waiting for one another
        count = 10 * world.size + number
        mine = draw_all(handed, number, count)
        assert mine == sorted(mine), "in their order"
        collectives.barrier(world)
        owners = handed.owners(number, count)
        assert np.flatnonzero(owners == world.rank).tolist() == mine
        assert sum(collectives.allgather_objects(world, len(mine))) == count


def test_numbers_are_given_while_rank_0_computes(world, handed, mpi_tmp_path):
    """Without a call of MPI, but for what its thread does: that all others are done is told in files."""
    collectives.barrier(world)
    if world.rank == 0:
        matrix, start = np.ones((300, 300)), time.monotonic()
        while len(list(mpi_tmp_path.glob("done-*"))) < world.size - 1:
            assert time.monotonic() - start < 60, "the others wait for rank 0"
            matrix @ matrix
    mine = draw_all(handed, 0, 4 * world.size)
    if world.rank:
        (mpi_tmp_path / f"done-{world.rank}").touch()
    counts = collectives.allgather_objects(world, len(mine))
    assert sum(counts) == 4 * world.size
    if world.size > 1:
        assert counts[0] == 1, "the others had all of them"


def test_where_it_does_not_work_the_plan_is_made_beforehand_and_that_is_told(world, monkeypatch):
    """As with an MPI that lets no threads call: on one rank, which all have to know of."""
    if world.rank == world.size - 1:
        monkeypatch.setattr(handout, "_threads_may_call", lambda: False)
    monkeypatch.setattr(handout, "TRIAL_TIMEOUT", 1.0)
    said: list[str] = []
    population = Population(3 * world.size, seed=3)
    with Assignment(world, population, Phases(), True, said.append) as assignment:
        mine = [block for block, _ in assignment.blocks(4)]
        assert mine == population.plan(4, world.size).blocks[world.rank]
        assert assignment.plan(4).blocks == population.plan(4, world.size).blocks
    assert said == [f"warning: {WITHOUT}"] * (world.size > 1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_nothing_is_handed_out_where_each_rank_has_one_block(world, monkeypatch, dynamic):
    monkeypatch.setattr("mpies.run.assignment.Handout", None)  # a call of it would fail
    size = world.size if dynamic else 3 * world.size
    with Assignment(world, Population(size, seed=3), Phases(), dynamic) as assignment:
        assert len(list(assignment.blocks(0))) == size // world.size


def test_each_rank_knows_about_how_many_blocks_are_left_for_it(world):
    with Assignment(world, Population(5 * world.size, seed=3), Phases(), True) as assignment:
        left = [left for _, left in assignment.blocks(0)]
        collectives.barrier(world)
    assert left[0] == 5 and left == sorted(left, reverse=True) and left[-1] >= 1


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_slow_rank_has_its_first_block_and_others_have_its_other_ones(world, dynamic):
    """As slow as can be: it is at its first until no other has one left, which a plan made beforehand allows.

    How long the others wait is in tests/bench/test_forecast.py.
    """
    with Assignment(world, Population(8 * world.size, seed=3), Phases(), dynamic) as assignment:
        mine = assignment.blocks(0)
        next(mine)
        if world.rank == world.size - 1:
            collectives.barrier(world)
            list(mine)
        else:
            list(mine)
            collectives.barrier(world)
        collectives.barrier(world)  # all have evaluated theirs
        counts = assignment.plan(0).counts
    if dynamic and world.size > 1:
        assert counts[-1] == 1 and sum(counts) == 8 * world.size, counts
    else:
        assert list(counts) == [8] * world.size


def test_blocks_that_are_handed_out_give_the_run_that_planned_ones_give(world, shared_model, mpi_tmp_path):
    """Low rank; of full noise, tests/test_train.py compares runs on any number of ranks with that on one."""
    runs = {}
    for assignment in ("static", "dynamic"):
        folder = mpi_tmp_path / assignment
        values = {
            "model.path": shared_model(), "model.device": "cpu", "model.dtype": "float32",
            "task.name": "conciseness", "es.population": 11, "es.antithetic": "false",
            "es.sigma": 0.3, "es.alpha": 0.3,
            "es.perturbation": "lowrank", "es.block": 2, "es.generations": 2,
            "engine.max_new_tokens": 16, "run.directory": folder, "run.assignment": assignment,
        }  # fmt: skip
        assert train.main(world, [f"{key}={value}" for key, value in values.items()]) == 0
        with open_for_reading(folder / "run.h5") as file:
            table = {name: column[:] for name, column in file["member"].items()}
            runs[assignment] = {"digest": file["generation/digest"][:], **table}
        collectives.barrier(world)
    for name in ("digest", "seed", "reward", "coefficient", "tokens"):
        np.testing.assert_array_equal(runs["static"][name], runs["dynamic"][name], err_msg=name)
    assert len(set(runs["dynamic"]["digest"])) == 2
    for owners in runs["dynamic"]["rank"]:
        assert set(owners) <= set(range(world.size))
        assert all(a == b for a, b in zip(owners[:10:2], owners[1:10:2], strict=True)), "a block has one"
    assert set(Counter(runs["dynamic"]["rank"].flat)) == set(range(world.size))


def test_the_default_is_dynamic():
    assert config.load([]).run.assignment == "dynamic"
