"""A generation's rows for the run file, against direct computation."""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
import pytest
import threads
from made_up import answers

from mpies.es.answers import Agreement, Answers, compare
from mpies.es.fitness import coefficients
from mpies.es.population import Plan, Population
from mpies.es.schedule import Step
from mpies.phases import PHASES, Phases
from mpies.run.exchange import Evaluated
from mpies.run.telemetry import COST, Costs, Diagnosis, Outcome, find, gather, make_rows
from mpies.runfile import TABLES, open_for_reading

MEMBERS, RANKS = 6, 3
REWARDS = np.array([-3.0, 0.1, math.nan, 2.25, -3.5, math.nan])
FOUND = Diagnosis(Agreement(0.5, 0.25, 1.0, 3.0), 0.125)


def outcome(rewards: np.ndarray = REWARDS) -> Outcome:
    plan = Population(MEMBERS, seed=9, antithetic=True).plan(4, RANKS)
    factors = np.arange(MEMBERS, dtype=np.float32)
    return Outcome(4, plan, Step(0.25, 0.5, 0.125), rewards, factors, digest=2**64 - 3)


def costs() -> Costs:
    members = np.zeros(MEMBERS, dtype=COST)
    members["tokens"], members["seconds"] = 10 + np.arange(MEMBERS), 0.5 * np.arange(MEMBERS)
    return Costs(members, np.random.default_rng(0).random((RANKS, len(PHASES))))


def test_rewards_of_a_generation_are_those_of_its_scored_members():
    row, _ = make_rows(outcome(), costs(), FOUND, 1.5, 112)
    assert row["reward_mean"] == pytest.approx(np.nanmean(REWARDS))
    assert row["reward_std"] == pytest.approx(np.nanstd(REWARDS))
    assert (row["reward_min"], row["reward_max"], row["unscored"]) == (-3.5, 2.25, 2)


def test_rewards_are_summed_exactly():
    """So that the file has the same numbers for any number of ranks and any machine."""
    row, _ = make_rows(outcome(np.array([1e16, 1.0, -1e16, 1.0, 1.0, 3.0])), costs(), FOUND, 1.5, 112)
    assert row["reward_mean"] == 1
    row, _ = make_rows(outcome(np.full(MEMBERS, 0.25)), costs(), FOUND, 1.5, 112)
    assert (row["reward_mean"], row["reward_std"], row["unscored"]) == (0.25, 0, 0)


def test_what_made_the_step_is_noted():
    row, _ = make_rows(outcome(), costs(), FOUND, 1.5, 112)
    assert {name: row[name] for name in ("sigma", "alpha", "anchor_decay", "digest")} == {
        "sigma": 0.25,
        "alpha": 0.5,
        "anchor_decay": 0.125,
        "digest": 2**64 - 3,
    }


def test_phases_are_means_over_the_ranks():
    spent = costs()
    row, _ = make_rows(outcome(), spent, FOUND, 1.5, 112)
    for i, phase in enumerate(PHASES):
        only = sum(spent.phases[:, i]) / RANKS if phase != "log" else spent.phases[0, i]
        assert row[f"seconds_{phase}"] == pytest.approx(only)


def test_imbalance_is_the_slowest_ranks_evaluation_over_the_mean():
    """Evaluation is perturbing, generating, scoring; what ranks wait for is no work."""
    rows = {rank: dict.fromkeys(PHASES, 7.0 * rank) for rank in range(RANKS)}
    for rank, (perturb, generate, reward) in enumerate([(1, 4, 1), (0, 2, 0), (0.5, 0, 1.5)]):
        rows[rank] |= {"perturb": perturb, "generate": generate, "reward": reward}
    spent = np.array([[rows[rank][phase] for phase in PHASES] for rank in range(RANKS)])
    row, _ = make_rows(outcome(), Costs(costs().members, spent), FOUND, 1.5, 112)
    assert row["imbalance"] == pytest.approx(6 / (10 / 3))


def test_every_member_has_its_row_in_member_order():
    made = outcome()
    row, members = make_rows(made, costs(), FOUND, 1.5, 112)
    everyone = Population(MEMBERS, seed=9, antithetic=True).members(4)
    assert members["seed"].tolist() == [member.seed for member in everyone]
    assert members["sign"].tolist() == [1, -1] * 3
    np.testing.assert_array_equal(members["reward"], REWARDS)
    np.testing.assert_array_equal(members["coefficient"], made.coefficients)
    assert members["tokens"].tolist() == [10, 11, 12, 13, 14, 15] and row["tokens"] == 75
    assert members["seconds"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    owner = {m.index: rank for rank, blocks in enumerate(made.plan.blocks) for block in blocks for m in block}
    assert members["rank"].tolist() == [owner[index] for index in range(MEMBERS)]


def test_the_rows_are_what_the_run_file_has_columns_for():
    row, members = make_rows(outcome(), costs(), FOUND, 1.5, 112)
    assert {column.name for column in TABLES["generation"]} == {*row, "checksum"}
    assert (row["seconds"], row["bytes_communicated"]) == (1.5, 112)
    assert {column.name for column in TABLES["member"]} == set(members)


def spent(rank: int) -> Phases:
    phases = Phases()
    for i, phase in enumerate(PHASES):
        phases.seconds[phase] = 10 * rank + i
    return phases


@pytest.mark.parametrize("generation", [0, 1])
def test_costs_are_gathered_in_member_order_on_rank_0(generation):
    """Blocks of 2, 2 and 1 members on 2 ranks, and on 4, of which one has none."""
    for ranks in (1, 2, 4):
        plan = Population(5, seed=9, block=2).plan(generation, ranks)

        def gathered(comm, plan=plan):
            mine = [
                Evaluated(m, 0.0, 10 + m.index, m.index / 4, answers(2, number=m.index))
                for b in plan.blocks[comm.rank]
                for m in b
            ]
            return gather(comm, plan, spent(comm.rank), mine)

        first, *others = threads.run(ranks, gathered)
        assert others == [None] * (ranks - 1)
        first, told = first
        assert [one.metrics["number"] for one in told] == [0, 1, 2, 3, 4]
        assert first.members["tokens"].tolist() == [10, 11, 12, 13, 14]
        assert first.members["seconds"].tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert first.phases.tolist() == [[10 * rank + i for i in range(len(PHASES))] for rank in range(ranks)]


def test_costs_of_a_rank_whose_blocks_are_in_another_order(alone):
    members = Population(5, seed=9).members(0)
    plan = Plan([[members[2:4], members[4:], members[:2]]])
    mine = [Evaluated(m, 0.0, 10 + m.index, 0.5, answers()) for block in plan.blocks[0] for m in block]
    phases = spent(0)
    assert gather(alone, plan, phases, mine)[0].members["tokens"].tolist() == [10, 11, 12, 13, 14]
    assert set(phases.seconds.values()) == {0.0}, "the next generation begins from zero"


def test_two_messages_from_each_rank_and_16_bytes_for_an_answer():
    """Beside some for each member, so that what rank 0 gets does not grow with the model."""
    plan = Population(4, seed=9).plan(0, 2)

    def gathered(comm, prompts):
        mine = [Evaluated(m, 0.0, 1, 0.5, answers(prompts)) for b in plan.blocks[comm.rank] for m in b]
        before, made = comm._collectives, gather(comm, plan, Phases(), mine)
        assert comm._collectives == before + 2
        return made

    few, many = (threads.run(2, partial(gathered, prompts=n))[0][0].received for n in (100, 1100))
    assert 4 * 1000 * 16 <= many - few < 4 * 1000 * 16 + 100


def test_what_the_answers_tell():
    """Of 6 members in antithetic pairs with 3 prompts, as counted by hand."""
    texts = np.array(["aab", "aaa", "abc", "xbc", "abz", "abz"], dtype=object)
    marks = np.array([[ord(c) for c in word] for word in texts], dtype=np.uint64)
    per_answer = np.array([[1.0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    rewards = per_answer.mean(axis=1)
    lengths = np.array([3.0, 1, 5, 2, 2, 2])
    told = [
        Answers(m, r, int(i == 0), {"length": x})
        for i, (m, r, x) in enumerate(zip(marks, per_answer, lengths))
    ]
    plan = Population(6, seed=9, antithetic=True).plan(0, 1)
    made = Outcome(0, plan, Step(0.1, 0.5), rewards, coefficients(rewards, 0.5), 1)
    members = np.zeros(len(lengths), dtype=COST)
    members["tokens"] = [3 * n for n in lengths]
    spent = Costs(members, costs().phases)
    found = find(made, spent, told, "zscore")
    assert found.agreement == Agreement(
        identical_pairs=pytest.approx(7 / 9),
        pairs_with_signal=pytest.approx(2 / 3),
        prompts_disagreeing=pytest.approx(2 / 3),
        distinct_answers=pytest.approx((2 + 2 + 4) / 3),
    )
    assert found.truncated == pytest.approx(1 / 18)
    assert found.metrics["length"].tolist() == lengths.tolist()
    assert found.cosines["length"] == pytest.approx(found.cosines["answer_tokens"])
    pushes = np.array([[1 / 3, 1 / 3, 0], [2, 3, 0]])  # the pairs' differences
    expected = pushes[0] @ pushes[1] / np.linalg.norm(pushes[0]) / np.linalg.norm(pushes[1])
    assert found.cosines["length"] == pytest.approx(expected)


def test_what_members_tell_that_are_no_pairs():
    """Any two members are one then."""
    marks = np.array([[1], [1], [2], [1]], dtype=np.uint64)
    rewards = np.array([0.5, 0.5, math.nan, 1.0])
    seeds = np.arange(4, dtype=np.uint64)
    found = compare(marks, rewards[:, None], rewards, seeds)
    assert found.identical_pairs == pytest.approx(3 / 6) and found.pairs_with_signal == pytest.approx(2 / 3)
    assert (found.prompts_disagreeing, found.distinct_answers) == (1, 2)
    alone = compare(marks[:1], rewards[:1, None], rewards[:1], seeds[:1])
    assert math.isnan(alone.identical_pairs) and math.isnan(alone.pairs_with_signal)


def test_a_generation_is_recorded_shown_and_looked_at(runs, capsys):
    """With what is known at its end only, and a warning if perturbations are too small to tell anything."""
    start = time.perf_counter()
    assert runs.train(2, es__sigma=1e-9) == 0
    took = time.perf_counter() - start
    with open_for_reading(runs.folder / "run.h5") as file:
        table = {name: column[:2] for name, column in file["generation"].items()}
    assert table["bytes_communicated"].tolist() == [16 * 4] * 2
    assert table["seconds_log"][0] == 0 < table["seconds_log"][1], "that of the row before"
    measured = sum(table[f"seconds_{phase}"] for phase in PHASES if phase != "log")
    assert (measured <= table["seconds"]).all() and table["seconds"].sum() < took
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("generation ")] == [
        "generation 1/2",
        "generation 2/2",
    ]
    assert sum(line.startswith("warning: generation 1: all members have the reward ") for line in lines) == 1
