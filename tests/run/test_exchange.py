"""What ranks tell one another in a generation, on one rank and on ranks that are threads."""

from __future__ import annotations

import math

import made_up
import numpy as np
import pytest
import threads

from mpies.errors import DivergedError, RefusedError
from mpies.es.population import Member, Plan, Population
from mpies.phases import Phases
from mpies.run.exchange import Evaluated, bytes_received, compare_replicas, end_evaluation, exchange_rewards
from mpies.time_limit import OutOfTimeError

HOSTS = ("alpha", "beta", "gamma")
# Of members 0 to 6 in blocks of 2, as a rank might get them: not in member order.
SHUFFLED = [[5, 4], [6], [0, 1], [3, 2]]


def reward_of(member: Member) -> float:
    return member.index / 7 - member.seed % 11


def evaluated(blocks: list[list[Member]]) -> list[Evaluated]:
    return [
        Evaluated(member, reward_of(member), 3, 0.1, made_up.answers())
        for block in blocks
        for member in block
    ]


def shuffled_plan() -> Plan:
    members = Population(7, seed=3).members(0)
    return Plan([[[members[i] for i in block] for block in SHUFFLED]])


def test_rewards_come_in_member_order(alone):
    plan = shuffled_plan()
    assert [member.index for block in plan.blocks[0] for member in block] == [5, 4, 6, 0, 1, 3, 2]
    rewards = exchange_rewards(alone, Phases(), plan, evaluated(plan.blocks[0]))
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [reward_of(member) for member in Population(7, seed=3).members(0)]


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_every_rank_gets_all_members_in_member_order(generation):
    """Of uneven shares: 3 blocks of 3, 3 and 1 members on 2 ranks, and of none on the last of 4."""
    population = Population(7, seed=3, block=3)
    expected = [reward_of(member) for member in population.members(generation)]
    for ranks in (2, 4):
        plan = population.plan(generation, ranks)

        def exchange(comm, plan=plan):
            return exchange_rewards(comm, Phases(), plan, evaluated(plan.blocks[comm.rank])).tolist()

        assert threads.run(ranks, exchange) == [expected] * ranks


def test_what_could_not_be_scored_stays_unknown(alone):
    plan = shuffled_plan()
    mine = [
        Evaluated(m, math.nan if m.index < 6 else -2.5, 3, 0.1, made_up.answers())
        for b in plan.blocks[0]
        for m in b
    ]
    rewards = exchange_rewards(alone, Phases(), plan, mine)
    assert np.isnan(rewards).tolist() == [True] * 6 + [False] and rewards[6] == -2.5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_generation_of_which_nothing_was_scored_is_refused_by_all(ranks):
    plan = Population(4, seed=3).plan(0, ranks)

    def exchange(comm):
        mine = [
            Evaluated(m, math.nan, 3, 0.1, made_up.answers())
            for block in plan.blocks[comm.rank]
            for m in block
        ]
        exchange_rewards(comm, Phases(), plan, mine)

    for error in threads.run(ranks, exchange):
        assert type(error) is RefusedError and "let the reward function return 0 for" in str(error)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_if_a_rank_has_left_members_out_all_are_out_of_time(missing):
    def end(comm):
        end_evaluation(comm, Phases(), complete=comm.rank != missing)

    assert [type(error) for error in threads.run(3, end)] == [OutOfTimeError] * 3


@pytest.mark.parametrize(
    "wrong, named", [([2], "rank 2 on gamma"), ([1, 2], "rank 1 on beta, rank 2 on gamma")]
)
@pytest.mark.parametrize("other", ["generation", "order"])
def test_rewards_of_other_members_than_the_plans_stop_all_ranks(wrong, named, other):
    """A rank that counts generations differently would send such."""
    population = Population(6, seed=3)
    plan = population.plan(0, 3)

    def exchange(comm):
        mine = evaluated(plan.blocks[comm.rank])
        if comm.rank in wrong:
            mine = mine[::-1] if other == "order" else evaluated(population.plan(3, 3).blocks[comm.rank])
        exchange_rewards(comm, Phases(), plan, mine)

    for error in threads.run(3, exchange, hosts=HOSTS):
        assert type(error) is DivergedError
        assert str(error).startswith(f"{named} evaluated other members than those of the plan; ")


@pytest.mark.parametrize("words", [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1)])
def test_all_stop_if_one_wants_to(words):
    def compare(comm):
        return compare_replicas(comm, Phases(), 2**64 - 1, lambda: bool(words[comm.rank]), 3)

    assert threads.run(3, compare) == [any(words)] * 3


def test_a_rank_alone_agrees_with_itself(alone):
    assert compare_replicas(alone, Phases(), 7, lambda: True, 0) is True
    assert compare_replicas(alone, Phases(), 7, lambda: False, 0) is False


@pytest.mark.parametrize(
    "digests, named",
    [
        ((7, 7, 8), "rank 2 on gamma"),
        ((2**63, 7, 7), "rank 0 on alpha"),
        ((7, 8, 9), "rank 1 on beta, rank 2 on gamma"),
        ((2**64 - 1, 2**64 - 2, 2**64 - 1), "rank 1 on beta"),  # no float keeps these apart
    ],
)
def test_diverged_replicas_stop_all_ranks_with_their_names(digests, named):
    def compare(comm):
        compare_replicas(comm, Phases(), digests[comm.rank], lambda: False, 4)

    for error in threads.run(3, compare, hosts=HOSTS):
        assert type(error) is DivergedError
        assert str(error).startswith(f"generation 5: the base weights of {named} differ from the others'; ")


def test_of_two_replicas_neither_is_blamed():
    def compare(comm):
        compare_replicas(comm, Phases(), comm.rank, lambda: False, 0)

    for error in threads.run(2, compare, hosts=HOSTS):
        assert "the base weights of rank 1 on beta and rank 0 differ; this generation" in str(error)


def test_waiting_and_communicating_are_told_apart(alone):
    phases, plan = Phases(), Population(4, seed=3).plan(0, 1)
    end_evaluation(alone, phases, complete=True)
    exchange_rewards(alone, phases, plan, evaluated(plan.blocks[0]))
    compare_replicas(alone, phases, 7, lambda: False, 0)
    spent = phases.take()
    assert all(spent[phase] > 0 for phase in ("wait", "communicate"))
    assert sum(spent.values()) == spent["wait"] + spent["communicate"]


def test_a_rank_receives_16_bytes_a_member_and_32_from_each_of_log_r_ranks():
    assert bytes_received(30, 1) == 16 * 30
    assert [bytes_received(30, ranks) - 480 for ranks in (2, 4, 5, 1024)] == [32, 64, 96, 320]
