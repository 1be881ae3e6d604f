"""Summaries and anomalies: numbers against the file, and each anomaly where it is and only there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import h5py
import launching
import made_up
import numpy as np
import pytest

from mpies.analyze import open_run
from mpies.analyze.anomalies import find_anomalies
from mpies.analyze.chart import binned, draw_chart, sparkline
from mpies.analyze.summary import summarize
from mpies.run.replaying import which_generation
from mpies.runfile import read_history

DATA = launching.DATA


def test_numbers_are_those_of_the_file():
    path = DATA / "schema-1.h5"
    summary = summarize(open_run(path), "name")
    with h5py.File(path) as file:
        rows = {name: column[:5] for name, column in file["generation"].items()}
    assert (summary.generations, summary.target, summary.ranks) == (5, 5, 3)
    assert summary.reward_first == rows["reward_mean"][0]
    assert summary.reward_last == rows["reward_mean"][-1]
    assert summary.seconds == pytest.approx(rows["seconds"].sum())
    assert summary.tokens == rows["tokens"].sum()
    assert summary.tokens_per_second == pytest.approx(rows["tokens"].sum() / rows["seconds"].sum())
    assert summary.imbalance == pytest.approx(rows["imbalance"].mean())
    assert sum(summary.time_shares.values()) == pytest.approx(1)
    total = rows["seconds"].sum() + rows["seconds_log"].sum()
    assert summary.efficiency == pytest.approx(rows["seconds_generate"].sum() / total, rel=0.05)
    assert summary.settings["es.sigma"] == 0.02 and "es.rank" not in summary.settings


def test_the_best_generation_is_what_replay_takes():
    path = DATA / "schema-1.h5"
    summary = summarize(open_run(path), "name")
    assert summary.best_generation == which_generation("best", read_history(path))
    with h5py.File(path) as file:
        held_out = file["evaluation/reward_mean"][:][file["evaluation/split"].asstr()[:] == "held_out"]
    assert summary.held_out_best == held_out.max()
    assert (summary.held_out_first, summary.held_out_last) == (held_out[0], held_out[-1])


def test_what_was_measured_besides_is_told(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=20, kl=0.5)
    assert summarize(open_run(path), "name").measured == {"kl": (0.0, 0.5), "answer_tokens": (12.5, 12.5)}


def test_later_evaluations_are_told(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=20)
    assert summarize(open_run(path), "name").evaluations == []
    made_up.evaluate_later(path, 20, reward=-3.0, accuracy=0.25, drift_l2=4.0, **{"drift_l2 layer 0": 1.0})
    made_up.evaluate_later(path, 10, samples=4, **{"pass@4": 0.75})
    made_up.evaluate_later(path, 20, reward=-2.0)
    sampled, greedy = summarize(open_run(path), "name").evaluations
    assert (sampled.generation, sampled.split, sampled.prompts) == (10, "held_out", 3)
    assert sampled.decoding == "4 samples at T=0.7, seed 42"
    assert sampled.figures == {"pass@4": (0.75, 0.5)}
    assert (greedy.generation, greedy.decoding, greedy.figures["drift_l2 layer 0"]) == (
        20,
        "greedy",
        (1, 0.5),
    )
    assert greedy.text() == "reward -2 +- 0.5, accuracy 0.25 +- 0.5, drift_l2 4 +- 0.5", "the latest"


def test_a_run_without_a_generation(tmp_path):
    summary = summarize(open_run(made_up.write_run(tmp_path / "run", generations=0)), "name")
    assert summary.generations == 0 and np.isnan(summary.tokens_per_second)
    assert summary.anomalies == []


# Anomalies

N, G = 16, 40


def with_changes(tmp_path: Path, change=lambda file: None, **options) -> list[str]:
    """The anomalies of a run in order, but for one change in its file."""
    path = made_up.write_run(tmp_path / "run", generations=G, **options)
    with h5py.File(path, "r+") as file:
        change(file)
        made_up.seal_all(file)
    return find_anomalies(open_run(path))


def test_a_run_in_order_has_none(tmp_path):
    assert with_changes(tmp_path) == []


def test_restarts():
    lines = find_anomalies(open_run(DATA / "schema-1.h5"))
    assert "restarted once, at generation 3" in lines and "ranks changed: 2, then 3" in lines


def test_unscored_members(tmp_path):
    def change(file):
        file["member/reward"][3, :2] = np.nan
        file["member/reward"][7, :5] = np.nan

    (line,) = with_changes(tmp_path, change)
    assert line == f"7 of {G * N} members unscored (1.09 %), most in generation 8: 5"


def test_a_generation_without_scores_has_no_spread_and_hides_no_collapse(tmp_path):
    def change(file):
        file["member/reward"][5] = np.nan
        file["generation/reward_mean"][5] = np.nan
        rewards = file["generation/reward_mean"]
        rewards[30:] = rewards[0]

    unscored, collapse, *_ = with_changes(tmp_path, change)
    assert "members unscored" in unscored and collapse.startswith("collapse: ")


def test_no_spread(tmp_path):
    def change(file):
        file["member/reward"][5:8] = -3.0

    (line,) = with_changes(tmp_path, change)
    assert line.startswith(f"in 3 of {G} generations all members got the same reward")


def test_collapse(tmp_path):
    def change(file):
        rewards = file["generation/reward_mean"]
        rewards[30:] = rewards[0]

    line, far = with_changes(tmp_path, change)
    assert line.startswith("collapse: mean reward fell from")
    assert "worse than the unperturbed model" in far, "whose evaluations did not collapse"


def test_noise_is_no_collapse(tmp_path):
    assert with_changes(tmp_path, gain=1.0, scatter=30.0) == []


def test_other_prompts_in_each_generation_are_no_collapse(tmp_path):
    """Members of a generation are alike, generations are not."""

    def change(file):
        rewards = file["generation/reward_mean"]
        rewards[:] = np.random.default_rng(1).normal(0, 20, len(rewards)) + np.linspace(0, 5, len(rewards))
        rewards[12], rewards[-1] = 50, -40

    assert with_changes(tmp_path, change, gain=1.0, scatter=1.0) == []


def test_idle_ranks(tmp_path):
    (line,) = with_changes(tmp_path, ranks=18)
    assert line.startswith("2 of 18 ranks idle in a generation, on average")


def test_slow_rank_is_named_with_its_host(tmp_path):
    def change(file):
        seconds = file["member/seconds"][:]
        seconds[file["member/rank"][:] == 3] *= 3
        file["member/seconds"][:] = seconds

    (line,) = with_changes(tmp_path, change, hosts=4)
    assert line.startswith(("rank 3 on node3 is slow: 2.9", "rank 3 on node3 is slow: 3"))


def test_imbalance(tmp_path):
    def change(file):
        file["generation/imbalance"][:] = 1.5

    (line,) = with_changes(tmp_path, change)
    assert line.startswith("imbalance: the slowest rank evaluates for 1.50 x")


def test_silence(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=G)
    made_up.rewind(path, 9)
    assert find_anomalies(open_run(path)) == [], "written just now"
    os.utime(path, times=(time.time() - 7200,) * 2)
    (line,) = find_anomalies(open_run(path))
    assert line == f"stopped or hanging: nothing was written for 2 h, at generation 9 of {G}"


# Curves as text


def test_sparkline():
    assert sparkline(np.arange(8.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.array([1.0, np.nan, 2.0]), 8) == "▁ █"
    assert sparkline(np.full(3, np.nan), 8) == "" == sparkline(np.zeros(0), 8)
    assert len(sparkline(np.arange(1000.0), 20)) == 20
    assert sparkline(np.arange(8.0), 8, plain=True).isascii()


def test_binned_means():
    assert binned(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist() == [2.0, 5.0]


@pytest.mark.parametrize("plain", [False, True])
def test_chart_places_points_and_labels(plain):
    curve = np.linspace(-10, 0, 101)
    lines = draw_chart(curve, {"o": (np.array([0, 100]), np.array([-20.0, 5.0]))}, 60, 8, plain)
    assert lines[0].startswith("  5 ") and lines[0].endswith("o")
    assert lines[7].startswith("-20 ") and lines[7][5] == "o"
    assert lines[-1].split() == ["0", "100"]
    assert {len(line) for line in lines[:8]} == {60}
    assert not plain or all(line.isascii() for line in lines)


def test_chart_of_nothing():
    assert draw_chart(np.full(3, np.nan), {}, 60, 8) == []
    assert draw_chart(np.zeros(0), {}, 60, 8) == []
    assert draw_chart(np.zeros(1), {"o": (np.array([0]), np.array([0.0]))}, 60, 8)
