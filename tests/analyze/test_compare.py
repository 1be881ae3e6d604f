"""Comparing groups of runs: who belongs together, and what the seeds prove."""

from __future__ import annotations

import math

import launching
import made_up
import numpy as np
import pytest
from scipy import stats

from mpies.analyze.compare import compare_runs, holm, permutation_p
from mpies.analyze.groups import group
from mpies.analyze.run import Run, open_run
from mpies.errors import InputError


@pytest.fixture
def write(tmp_path):
    """write(*settings, **made_up options) -> Run."""
    count = iter(range(1000))

    def run(*settings: str, generations: int = 10, **options) -> Run:
        folder = tmp_path / f"run{next(count)}"
        return open_run(made_up.write_run(folder, *settings, generations=generations, **options))

    return run


def test_runs_that_differ_in_the_seed_only_are_a_group(write):
    runs = [write(f"es.sigma={s}", f"es.seed={i}") for s in (0.002, 0.001) for i in range(2)]
    groups = group(runs)
    assert [(g.label, g.seeds) for g in groups] == [("sigma=0.001", [0, 1]), ("sigma=0.002", [0, 1])]
    assert groups[0].runs == runs[2:]


def test_how_a_job_runs_does_not_part_runs(write):
    (only,) = group([write(), write("run.keep_samples=3", "run.time_limit=60"), write(generations=4)])
    assert only.label == "same settings" and len(only.runs) == 3


def test_numbers_are_ordered_as_numbers(write):
    labels = [g.label for g in group([write(f"es.population={n}") for n in (100, 8, 20)])]
    assert labels == ["population=8", "population=20", "population=100"]


def test_means_and_deviations_over_seeds(write):
    gains = {0.001: (90, 100, 110), 0.002: (50, 60, 70)}
    runs = [
        write(f"es.sigma={sigma}", f"es.seed={i}", gain=gain)
        for sigma, three in gains.items()
        for i, gain in enumerate(three)
    ]
    result = compare_runs(runs)
    assert [row.group.label for row in result.rows] == ["sigma=0.002", "sigma=0.001"], "highest first"
    for row in result.rows:
        last = [run.evaluated("held_out")[1][-1] for run in row.group.runs]
        assert row.values == last and row.seeds == 3
        assert row.mean == pytest.approx(np.mean(last))
        assert row.deviation == pytest.approx(np.std(last, ddof=1))
    assert math.isnan(result.rows[0].p)
    # All three are better than all three others: 2 of 20 arrangements are as extreme.
    assert result.rows[1].p == pytest.approx(0.1) == result.rows[1].p_least
    assert any("p cannot fall below 0.1" in note for note in result.notes)


def test_members_rewards_at_a_generation(write):
    run = write(generations=40)
    (row,) = compare_runs([run], "reward", at=20).rows
    assert row.mean == run.generations.reward_mean[19] and row.generations == (20, 20)
    (row,) = compare_runs([run], "reward").rows
    assert row.mean == pytest.approx(run.generations.reward_mean[38:].mean())


def test_held_out_at_a_generation(write):
    run = write(generations=40)
    (row,) = compare_runs([run], at=25).rows
    table = run.evaluations
    expected = table[(table.split == "held_out") & (table.generation == 20)].reward_mean.item()
    assert row.mean == expected and row.generations == (20, 20)


def test_other_measurements(write):
    (row,) = compare_runs([write(kl=0.7)], "kl").rows
    assert row.mean == 0.7
    with pytest.raises(InputError, match="no run has measured accuracy"):
        compare_runs([write()], "accuracy")


def test_a_single_seed_proves_nothing(write):
    result = compare_runs([write("es.sigma=0.1", gain=1), write("es.sigma=0.2", gain=99)])
    assert all(math.isnan(row.p) and math.isnan(row.deviation) for row in result.rows)
    assert any("single seed" in note for note in result.notes)
    assert not any("too few" in note for note in result.notes)


def test_the_same_seed_twice_counts_once(write):
    result = compare_runs([write("es.seed=1"), write("es.seed=1")])
    assert result.rows[0].seeds == 1
    assert any("2 runs of 1 seed" in note for note in result.notes)


def test_different_lengths_are_said(write):
    result = compare_runs([write("es.sigma=0.1", generations=10), write("es.sigma=0.2", generations=30)])
    assert any("10 to 30" in note and "--generation 10" in note for note in result.notes)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5), (5, 4)])
def test_permutation_test_as_in_scipy(sizes):
    random = np.random.default_rng(sum(sizes))
    for _ in range(5):
        a, b = random.normal(0, 1, sizes[0]), random.normal(0.8, 1, sizes[1])

        def difference(x, y, axis):
            return abs(np.mean(x, axis=axis) - np.mean(y, axis=axis))

        reference = stats.permutation_test(
            (a, b), difference, alternative="greater", n_resamples=np.inf, vectorized=True
        )
        assert permutation_p(a, b) == pytest.approx(reference.pvalue)


def test_permutation_test_of_many_is_drawn():
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, 12), random.normal(0.8, 1, 12)
    assert permutation_p(a, b) == pytest.approx(stats.ttest_ind(a, b).pvalue, abs=0.02)
    assert permutation_p(a, b) == permutation_p(a, b)


def test_equal_groups_differ_in_nothing():
    assert permutation_p([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_holm():
    # Holm 1979: times 3, 2, 1 in ascending order, never falling.
    assert holm([0.04, 0.01, 0.03], 3) == pytest.approx([0.06, 0.03, 0.06])
    # Of four groups, the best of which was chosen after looking, there are six pairs.
    assert holm([0.04, 0.01, 0.03], 6) == pytest.approx([0.16, 0.06, 0.15])
    assert holm([math.nan, 0.2], 1)[1] == 0.2 and math.isnan(holm([math.nan, 0.2], 1)[0])


def test_a_file_of_another_version_is_compared_too(write):
    old = open_run(launching.DATA / "schema-1-first.h5")
    assert len(group([old, write()])) == 2
