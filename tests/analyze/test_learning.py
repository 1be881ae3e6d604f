"""Why a run learns, or not, as the analysis tells it: numbers, text, panels; and runs without all that."""

from __future__ import annotations

import json
import math

import h5py
import launching
import made_up
import numpy as np
import pytest
from scipy import stats

from mpies.analyze import learning, open_run
from mpies.analyze.anomalies import find_anomalies
from mpies.analyze.commands import main
from mpies.analyze.export import scalars
from mpies.analyze.run import Run
from mpies.measure.statistics import sign_test

G = 20
# Of eight held-out prompts: three fixed and one broken at first, then one more fixed; one is never scored.
RIGHT = {
    0: [0, 0, 0, 1, 1, 0, 0, math.nan],
    10: [1, 1, 1, 0, 1, 0, 0, 1.0],
    20: [1, 1, 1, 0, 1, 1, 0, math.nan],
}
TOLD = {"identical_pairs": 0.25, "pairs_with_signal": 0.75, "prompts_disagreeing": 0.5, "truncated": 0.0}


@pytest.fixture
def path(tmp_path):
    return made_up.write_run(tmp_path / "run", generations=G)


@pytest.fixture
def told(path) -> Run:
    """Figures that change halfway, so that it matters of when a mean is."""
    halves = np.repeat([0.0, 0.5], G // 2)
    made_up.tell(
        path,
        RIGHT,
        **(TOLD | {"pairs_with_signal": halves + 0.25}),
        distinct_answers=3.5,
        cosine_accuracy=np.where(np.arange(G) % 2, 0.8, math.nan),
        cosine_format=-0.5 - halves,
    )
    return open_run(path)


def test_figures_are_those_of_the_latest_generations(told):
    assert learning.told_lately(told) == pytest.approx({**TOLD, "distinct_answers": 3.5})
    found = learning.cosines_lately(told)
    assert list(found) == ["format", "accuracy"], "the strongest first"
    assert found == pytest.approx({"format": -1.0, "accuracy": 0.4}), "where there is none, it has no part"


def test_prompts_that_were_fixed_and_broken(told):
    found = learning.changes(told, "held_out")
    assert [(c.before, c.after, c.by, c.prompts, c.fixed, c.broken) for c in found] == [
        (0, 10, "accuracy", 7, 3, 1),
        (10, 20, "accuracy", 7, 1, 0),
        (0, 20, "accuracy", 7, 4, 1),
    ]
    assert found[-1].net == 3 and found[-1].p == pytest.approx(stats.binomtest(4, 5).pvalue)
    assert learning.changes(told, "train") == []
    assert [(c.before, c.after) for c in learning.changes_since_start(told, "held_out")] == [(0, 10), (0, 20)]


def test_rewards_are_compared_where_accuracy_is_unknown(path):
    made_up.tell(path, {0: [math.nan] * 4, 20: [math.nan] * 4})
    (change,) = learning.changes(open_run(path), "held_out")
    assert (change.by, change.prompts, change.fixed, change.broken, change.p) == ("reward", 4, 0, 0, 1)
    assert "0 better, 0 worse" in change.text()


@pytest.mark.parametrize("better", [0, 1, 7, 60, 1000])
@pytest.mark.parametrize("worse", [0, 3, 40, 1000])
def test_sign_test_as_in_scipy(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def test_it_is_told_in_summary_and_watch(told, capsys):
    assert main(["summary", str(told.path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "lately, 25.0 % of pairs answer alike, 75.0 % of pairs have a signal, 50.0 % of prompts divide",
        "0.0 % of answers cut off; 3.5 different answers to a prompt",
        "format -1.00 (100 % of it), accuracy 0.40 (16 % of it)",
        "held-out, generation 0 to 20: 4 fixed, 1 broken, net +3 of 7, p 0.38",
    ):
        assert part in out, part
    assert main(["summary", "--json", str(told.path)]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["cosines"]["format"] == -1 and summary["changes"][2]["fixed"] == 4
    assert main(["watch", str(told.path)]) == 0
    assert "75 % of pairs with a signal" in capsys.readouterr().out


def test_it_is_exported(told, tmp_path):
    values = [found for _, _, found in scalars(told)]
    assert values[11]["cosine/accuracy"] == 0.8 and values[11]["generation/pairs_with_signal"] == 0.75
    assert main(["export", str(told.path), "--format", "csv", "--output", str(tmp_path / "csv")]) == 0
    assert len((tmp_path / "csv/prompts.csv").read_text().splitlines()) == 1 + 3 * 8
    assert told.prompts.groupby("generation").accuracy.sum().tolist() == [2, 5, 5]


def test_panels_show_it(told):
    pytest.importorskip("matplotlib")
    from mpies.analyze.figures import draw

    signal, shares, changes = draw([told], ["signal", "shares", "changes"]).axes
    lines = {line.get_label(): line.get_ydata() for line in signal.lines}
    assert lines["pairs whose rewards differ"][[0, -1]].tolist() == [25, 75] and len(lines) == 4
    lines = {line.get_label(): line.get_ydata() for line in shares.lines}
    assert lines["format"][[0, -1]].tolist() == [-0.5, -1] and lines["accuracy"][[0, -1]].tolist() == [0, 0.8]
    (net,) = (line for line in changes.lines if line.get_label() == "net")
    assert [list(map(float, values)) for values in net.get_data()] == [[0, 10, 20], [0, 2, 3]]
    both = draw([told, told], ["signal", "shares", "changes"])
    assert [len(axes.lines) for axes in both.axes] == [2, 3, 3], "with the lines at 0"


def test_symptoms_are_anomalies(told, path):
    assert find_anomalies(told) == [], "a run in order"
    made_up.tell(path, identical_pairs=0.75, cosine_accuracy=0.1)
    lines = find_anomalies(open_run(path))
    assert [line.split(" of the pairs")[0] for line in lines[:1]] == ["75 %"]
    assert "the update is that of format alone" in lines[1] and len(lines) == 2


def test_members_far_below_the_unperturbed_model(path):
    """Those from the tenth generation on, when the evaluation was much better."""
    with h5py.File(path, "r+") as file:
        train = file["evaluation/split"].asstr()[:] == "train"
        file["evaluation/reward_mean"][:] = np.where(
            train & (file["evaluation/generation"][:] == 10), 900, -900
        )
        made_up.seal_all(file)
    (line,) = find_anomalies(open_run(path))
    assert line.startswith("10 times, 3 generations' members were more than 2 of their standard deviations")


def test_runs_of_earlier_versions_know_nothing_of_it(capsys):
    run = open_run(launching.DATA / "schema-1.h5")
    assert (
        learning.told_lately(run) == learning.cosines(run) == {} and learning.changes(run, "held_out") == []
    )
    assert main(["summary", str(run.path)]) == 0 and "answers  " not in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert main(["plot", str(run.path), "--panels", "shares", "--output", "x.svg"]) == 2
