"""The population: seeds, antithetic pairs, blocks, which rank evaluates what, and the update's directions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpies.es import population
from mpies.es.directions import directions
from mpies.es.population import Member, Population

SIZES = range(1, 10)
RANKS = range(1, 8)
BLOCKS = range(1, 5)


def test_seeds_are_pinned():
    """A run is replayed from its seeds, and continued with the same ones."""
    seeds = [m.seed for generation in (0, 1, 499) for m in Population(2, 42).members(generation)]
    assert [f"{seed:016x}" for seed in seeds] == [
        "9807e02220439b04",
        "5a936ff51f858d22",
        "c33f716e4d4512a7",
        "1898204c440b85ec",
        "f8d7687db4e029f1",
        "0b2e3b823d79e9ec",
    ]


def test_seeds_have_64_bits():
    seeds = [member.seed for member in Population(64, 0).members(0)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert any(seed >> 63 for seed in seeds) and any(seed & 1 for seed in seeds)


@pytest.mark.parametrize("block", [1, 4])
def test_a_generations_members_are_made_once(monkeypatch, block):
    """Blocks to evaluate, then a plan of who had them: of 8192 members, a list takes 20 ms and more."""
    made = []
    monkeypatch.setattr(population, "Member", lambda *given: made.append(given) or Member(*given))
    some, other = Population(32, 42, block=block), Population(32, 43, block=block)
    for one, generation in ((some, 7), (some, 8), (other, 8)):
        made.clear()
        blocks = one.blocks(generation)
        assert one.plan_of(generation, 2, [0] * len(blocks)).members == [m for b in blocks for m in b]
        assert len(made) == 32
        one.members(generation).clear()
        assert len(one.members(generation)) == 32, "a list that is the caller's own"


@pytest.mark.parametrize("antithetic", [False, True])
def test_members_are_numbered(antithetic):
    members = Population(8, 42, antithetic).members(3)
    assert [member.index for member in members] == list(range(8))


def test_without_pairs_all_signs_are_plus():
    members = Population(8, 42).members(0)
    assert {member.sign for member in members} == {1}
    assert len({member.seed for member in members}) == 8


def test_antithetic_members_come_in_pairs():
    members = Population(8, 42, antithetic=True).members(0)
    for plus, minus in zip(members[::2], members[1::2], strict=True):
        assert plus.seed == minus.seed
        assert (plus.sign, minus.sign) == (1, -1)
    assert len({member.seed for member in members}) == 4


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_smaller_population_is_the_head_of_a_larger_one(antithetic):
    assert Population(4, 7, antithetic).members(5) == Population(10, 7, antithetic).members(5)[:4]


def test_seeds_follow_from_the_setting_and_the_generation_alone():
    assert Population(6, 1).members(2) == Population(6, 1, block=4).members(2)
    assert Population(6, 1).members(2) != Population(6, 1).members(3)
    assert Population(6, 1).members(2) != Population(6, 2).members(2)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_blocks_cut_the_population_in_order(size, block):
    population = Population(size, 42, block=block)
    blocks = population.blocks(1)
    assert [member for one in blocks for member in one] == population.members(1)
    assert [len(one) for one in blocks[:-1]] == [block] * (len(blocks) - 1)
    assert 1 <= len(blocks[-1]) <= block


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size, block", list(itertools.product(SIZES, BLOCKS)))
def test_ranks_share_the_blocks(size, block, ranks):
    population = Population(size, 42, block=block)
    for generation in (0, 1, 5, 12):
        shares = population.plan(generation, ranks).blocks
        taken = sorted((one for share in shares for one in share), key=lambda one: one[0].index)
        assert taken == population.blocks(generation), "each block is evaluated once, as it is"
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size, ranks", [(30, 4), (16, 3), (5, 4), (2, 7)])
def test_ranks_take_turns_with_the_extra_block(size, ranks):
    population = Population(size, 42)
    plans = [population.plan(generation, ranks) for generation in range(ranks)]
    totals = [sum(len(plan.blocks[rank]) for plan in plans) for rank in range(ranks)]
    assert totals == [size] * ranks


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size, antithetic", [(1, False), (5, False), (8, True), (30, True)])
def test_plan_leads_from_rank_order_to_member_order(size, antithetic, ranks):
    population = Population(size, 42, antithetic)
    for generation in (0, 3):
        plan = population.plan(generation, ranks)
        members = population.members(generation)
        assert plan.members == members
        assert plan.seeds.dtype == np.uint64 and plan.seeds.tolist() == [m.seed for m in members]
        assert plan.signs.dtype == np.int8 and plan.signs.tolist() == [m.sign for m in members]
        # Each rank sends the numbers of its members, after one another.
        sent = [[member.index for block in blocks for member in block] for blocks in plan.blocks]
        assert plan.counts == [len(indices) for indices in sent]
        gathered = np.array([index for indices in sent for index in indices])
        assert gathered[plan.order].tolist() == list(range(size))
        assert all(index in sent[rank] for index, rank in enumerate(plan.rank_of))


def test_directions_of_single_members():
    seeds = np.array([2**64 - 1, 5, 6], dtype=np.uint64)
    made, factors = directions(seeds, np.array([1, 1, 1]), np.array([0.5, -0.25, 2], dtype=np.float32))
    assert made.dtype == np.uint64 and factors.dtype == np.float32
    assert made.tolist() == [2**64 - 1, 5, 6]
    assert factors.tolist() == [0.5, -0.25, 2]


def test_directions_merge_pairs_and_keep_the_order():
    seeds = np.array([9, 9, 3, 3, 7, 7], dtype=np.uint64)
    signs = np.array([1, -1, 1, -1, 1, -1], dtype=np.int8)
    made, factors = directions(seeds, signs, np.array([1, 0.25, 0.5, 0.75, -2, 2], dtype=np.float32))
    assert made.tolist() == [9, 3, 7]
    assert factors.tolist() == [0.75, -0.25, -4]


def test_directions_drop_what_does_not_move():
    seeds = np.array([1, 1, 2, 3, 4, 4], dtype=np.uint64)
    signs = np.array([1, -1, 1, 1, 1, -1], dtype=np.int8)
    coefficients = np.array([0.5, 0.5, 0, 1, 2, 0], dtype=np.float32)
    made, factors = directions(seeds, signs, coefficients)
    assert made.tolist() == [3, 4]
    assert factors.tolist() == [1, 2]


def test_no_directions():
    made, factors = directions(np.array([1, 2], dtype=np.uint64), np.array([1, 1]), np.zeros(2, np.float32))
    assert made.shape == factors.shape == (0,)
    assert made.dtype == np.uint64 and factors.dtype == np.float32


def test_directions_of_a_real_population():
    """The merged sum is the sum over members."""
    members = Population(30, 42, antithetic=True).members(0)
    coefficients = np.random.default_rng(0).normal(size=30).astype(np.float32)
    made, factors = directions(
        np.array([m.seed for m in members], dtype=np.uint64),
        np.array([m.sign for m in members]),
        coefficients,
    )
    assert made.tolist() == [m.seed for m in members[::2]]
    assert np.array_equal(factors, coefficients[::2] - coefficients[1::2])
