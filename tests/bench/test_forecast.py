"""The forecast's model: its waiting, its messages, and what the program's own exchange comes to."""

from __future__ import annotations

import launching
import made_up
import numpy as np
import pytest
import threads

from mpies.bench import forecast, waiting
from mpies.bench.__main__ import parse
from mpies.bench.forecast import Constants, evaluate
from mpies.es.population import Population
from mpies.phases import Phases
from mpies.ranks.pace import Paces, Round
from mpies.run import exchange
from mpies.run.exchange import Evaluated, compare_replicas, end_evaluation, exchange_rewards
from mpies.run.telemetry import gather


def hostile(ranks: int, blocks: int, dynamic: bool, generations: int = 20) -> float:
    """Blocks of 1 to 4 seconds, one rank 3 times slower: the share of waiting, a mean over generations."""
    draw, paces = np.random.default_rng(7), Paces()
    speeds = np.array([1.0] * (ranks - 1) + [3.0])
    shares = []
    for _ in range(generations):
        lengths = draw.integers(1, 5, ranks * blocks).astype(float)
        shares.append(evaluate(lengths, speeds, dynamic, paces)[1])
    return float(np.mean(shares[1:]))  # in the first, nobody knows who is slow


@pytest.mark.parametrize("ranks", [2, 3, 4, 16, 64])
@pytest.mark.parametrize("blocks", [4, 8, 16])
def test_in_the_hostile_case_ranks_wait_less_than_a_block(ranks, blocks):
    assert hostile(ranks, blocks, dynamic=True) < 1 / blocks
    assert hostile(ranks, blocks, dynamic=False) > 0.25


# A generation, by handing out and by a plan: what ranks wait, and how many blocks each has.
MEASURE = """
import sys
from mpies.bench import waiting
from mpies.ranks import collectives, launch

def main(comm, arguments):
    collectives.set_timeout(comm, 300)
    for dynamic in (True, False):
        found = waiting.measure(comm, dynamic, blocks=8, generations=1, unit=0.05)
        if comm.rank == 0:
            print(found.share, *found.counts, flush=True)
    return 0

launch.run(main, sys.argv[1:])
"""


@pytest.mark.launch
@pytest.mark.timed
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 16, 64])
def test_ranks_wait_as_the_model_says(tmp_path, ranks):
    """With blocks that sleep, so that there may be more ranks than cores."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    ended = launching.mpirun(ranks, script, timeout=300)
    assert ended.returncode == 0, ended.stderr
    lengths = np.array([waiting.units_of(block) for block in Population(8 * ranks, seed=3).blocks(0)], float)
    speeds = np.array([1.0] * (ranks - 1) + [waiting.SLOWER])
    for line, dynamic in zip(ended.stdout.splitlines(), (True, False), strict=True):
        share, *counts = line.split()
        assert sum(map(int, counts)) == 8 * ranks
        _, expected = evaluate(lengths, speeds, dynamic and ranks > 1)
        assert float(share) == pytest.approx(expected, abs=0.12), (dynamic, counts)


def test_equal_blocks_are_waited_for_no_longer_than_by_a_plan():
    for ranks, blocks in ((2, 5), (4, 10), (8, 8), (16, 17)):
        times = [evaluate(np.ones(blocks), np.ones(ranks), dynamic) for dynamic in (True, False)]
        assert times[0] == times[1]


def test_a_slow_rank_is_left_out_where_others_are_done_sooner_and_the_last_one_never_is():
    paces = Paces()
    for rank, seconds in ((2, 9.0), *[(0, 1.0), (1, 1.0)] * 9):
        paces.note(rank, seconds)
    handed = Round(3, now=0.0)
    assert handed.give(2, 5, 1.0, paces) is None, "of two that are left, it would still be at one after 10 s"
    assert handed.give(0, 5, 1.0, paces) == 3 and handed.give(1, 5, 1.0, paces) == 4
    handed = Round(3, now=0.0)
    assert handed.give(2, 100, 1.0, paces) == 3, "there is enough for all"
    alone = Round(1, now=0.0)
    assert alone.give(0, 2, 9.0, paces) == 1
    handed = Round(3, now=0.0)
    assert [handed.give(rank, 3, 1.0, paces) for rank in (0, 1)] == [None, None]
    assert handed.give(2, 4, 1.0, paces) == 3, "the others have gone"


@pytest.mark.parametrize("ranks", [1, 2, 5, 16, 32])
def test_collectives_of_a_generation_do_not_depend_on_the_number_of_ranks(ranks):
    """And their bytes grow with its logarithm, besides 16 a member and rank 0's run file."""
    population = Population(40, seed=3)

    def generation(comm):
        phases, plan = Phases(), population.plan(0, comm.size)
        members = [member for block in plan.blocks[comm.rank] for member in block]
        mine = [Evaluated(member, float(member.index), 1, 0.1, made_up.answers()) for member in members]
        end_evaluation(comm, phases, complete=True)
        exchange_rewards(comm, phases, plan, mine)
        compare_replicas(comm, phases, 7, lambda: False, 0)
        gather(comm, plan, phases, mine)
        return comm.sent

    for sent in threads.run(ranks, generation):
        names = [name for name, _ in sent]
        # The owners of blocks are broadcast where blocks are handed out.
        assert len(names) == forecast.COLLECTIVES - 1 and not {"Isend", "Irecv"} & set(names)
        words = sum(size for name, size in sent if name == "Iallreduce")
        assert words == exchange.WORDS, "of each step of a tree"


def test_messages_and_bytes_grow_with_the_logarithm():
    few, many = (forecast.messages(ranks, 4 * ranks) for ranks in (8, 4096))
    assert many == 4 * few - 3 * 4, "4 times the steps; as many requests"
    members = 8192
    few, many = (exchange.bytes_received(members, ranks) for ranks in (8, 4096))
    assert many - few == 9 * exchange.WORDS


def test_the_forecast_is_asked_for_by_an_option():
    given = parse(["--forecast", "--population", "64"])
    assert (given.only, given.population) == (["generation"], 64)


def test_a_forecast_adds_up_and_handing_out_never_loses():
    measured = Constants(one=0.5, many=2.0, members=32, update=0.001)
    assert (measured.block(1), measured.block(32)) == (0.5, 2.0)
    for ranks in (1, 8, 64, 256):
        cost = forecast.forecast(measured, 8192, ranks)
        assert cost.dynamic <= cost.static and cost.waiting_dynamic <= cost.waiting_static
        assert cost.update == pytest.approx(8.192)
        assert cost.dynamic > cost.update + cost.exchange
    rows = list(forecast.table({"low rank": measured}, 64))
    assert len(rows) == 6 * len(forecast.RANKS) and all(value >= 0 for _, value, _ in rows)
