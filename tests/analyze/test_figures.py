"""Figures show what is in the file, and can be read with one run and with fifty."""

from __future__ import annotations

import itertools
from dataclasses import replace

import h5py
import launching
import made_up
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mpies.analyze.figures import PANELS, draw
from mpies.analyze.figures.effort import PHASE_COLOURS
from mpies.analyze.figures.view import COLOURS, arrange
from mpies.analyze.run import Run, open_run
from mpies.drawing import save
from mpies.errors import InputError
from mpies.phases import PHASES

DATA = launching.DATA


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """Ten settings, five seeds each; KL measured."""
    folder = tmp_path_factory.mktemp("runs")
    firsts = [
        open_run(
            made_up.write_run(
                folder / f"countdown-alpha{a}-seed0",
                f"es.alpha={a / 1000}",
                "es.seed=0",
                generations=24,
                gain=100 - 5 * a,
                kl=0.1 * a,
            )
        )
        for a in range(1, 11)
    ]
    return [reseeded(run, seed) for run in firsts for seed in range(5)]


def reseeded(run: Run, seed: int) -> Run:
    """The run as if with another seed: other rewards, and a generation more for each."""
    tables = {name: dict(columns) for name, columns in run.tables.items()}
    for table in ("generation", "member"):
        tables[table] = {name: values[: 20 + seed] for name, values in tables[table].items()}
    for table in ("evaluation", "sample"):
        kept = tables[table]["generation"] <= 20 + seed
        tables[table] = {name: values[kept] for name, values in tables[table].items()}
    tables["generation"]["reward_mean"] = tables["generation"]["reward_mean"] + seed
    tables["evaluation"]["reward_mean"] = tables["evaluation"]["reward_mean"] + seed
    return replace(
        run,
        path=run.path.parent.with_name(run.path.parent.name.replace("seed0", f"seed{seed}")) / "run.h5",
        settings={**run.settings, "es": {**run.settings["es"], "seed": seed}},
        attributes={**run.attributes, "generations_committed": 20 + seed},
        tables=tables,
    )


@pytest.fixture(scope="module")
def one() -> Run:
    return open_run(DATA / "schema-1.h5")


def axes_of(figure, panel: str):
    """The axes with this panel's title; more than one match is a mistake."""
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left") == PANELS[panel].title]
    return found


def lines_of(axes) -> list[tuple[list[float], list[float]]]:
    return [(np.asarray(x).tolist(), np.asarray(y).tolist()) for x, y in (li.get_data() for li in axes.lines)]


def read(name: str) -> np.ndarray:
    with h5py.File(DATA / "schema-1.h5") as file:
        dataset = file[name]
        return dataset.asstr()[:] if h5py.check_string_dtype(dataset.dtype) else dataset[:]


def test_learning_curve_shows_the_file(one):
    axes = axes_of(draw([one], ["learning"]), "learning")
    lines = lines_of(axes)
    assert (list(range(5)), read("generation/reward_mean").tolist()) in lines
    for split in ("train", "held_out"):
        rows = read("evaluation/split") == split
        rows &= np.isfinite(read("evaluation/reward_mean"))
        order = np.argsort(read("evaluation/generation")[rows])
        points = (
            read("evaluation/generation")[rows][order].tolist(),
            read("evaluation/reward_mean")[rows][order].tolist(),
        )
        assert points in lines, split
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    mean, deviation = read("generation/reward_mean"), read("generation/reward_std")
    assert np.isclose(heights.max(), (mean + deviation).max())
    assert np.isclose(heights.min(), (mean - deviation).min())


def test_answers_and_minutes_before_each_generation(one):
    figure = draw([one], ["answers", "time"])
    assert axes_of(figure, "answers").get_xlabel() == "answers evaluated"
    # 6 members answer 2 prompts each.
    shown = [x for x, _ in lines_of(axes_of(figure, "answers"))]
    assert [0, 12, 24, 36, 48] in shown
    evaluated = one.evaluations[one.evaluations.split == "held_out"].generation
    assert (12 * evaluated).tolist() in shown, "evaluations lie where their generation begins"
    seconds = read("generation/seconds")
    expected = np.concatenate([[0], np.cumsum(seconds)[:-1]]) / 60
    assert axes_of(figure, "time").get_xlabel() == "minutes of computing"
    assert any(np.allclose(x, expected) for x, _ in lines_of(axes_of(figure, "time")) if len(x) == 5)


def test_all_members_are_in_the_image(one):
    (image,) = axes_of(draw([one], ["members"]), "members").images
    shown = np.ma.filled(image.get_array(), np.nan)
    rewards = read("member/reward")
    assert shown.shape == (6, 5)
    assert np.array_equal(shown, -np.sort(-rewards, axis=1).T, equal_nan=True), "best on top"


def test_unscored_members_are_blank(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=4)
    with h5py.File(path, "r+") as file:
        file["member/reward"][1, 3] = np.nan
    (image,) = axes_of(draw([open_run(path)], ["members"]), "members").images
    assert np.argwhere(np.ma.getmaskarray(image.get_array())).tolist() == [[15, 1]], "at the bottom"


def test_phases_add_up_to_the_generation(one):
    axes = axes_of(draw([one], ["phases"]), "phases")
    top = max(path.vertices[:, 1].max() for area in axes.collections for path in area.get_paths())
    names = ("perturb", "generate", "reward", "communicate", "wait", "update", "log")
    phases = sum(read(f"generation/seconds_{name}") for name in names)
    assert np.isclose(
        top, np.maximum(read("generation/seconds") + read("generation/seconds_log"), phases).max()
    )


def test_every_phase_has_a_colour_of_its_own():
    assert set(PHASE_COLOURS) == {*PHASES, "other"}
    assert len(set(PHASE_COLOURS.values())) == len(PHASE_COLOURS)


def test_phases_of_several_are_shares(runs):
    axes = axes_of(draw(runs[:3], ["phases"]), "phases")
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(-1, 3)
    assert np.allclose(widths.sum(axis=0), 100)


def test_ranks_of_the_latest_start(one):
    axes = axes_of(draw([one], ["ranks"]), "ranks")
    latest = read("member/rank")[3:], read("member/seconds")[3:]
    busy = np.stack([np.where(latest[0] == rank, latest[1], 0).sum(axis=1) for rank in range(3)])
    expected = np.median(busy / busy.mean(axis=0), axis=1)
    assert any(np.allclose(y, expected) for x, y in lines_of(axes) if len(x) == 3)


def test_kl_plane_pairs_reward_and_kl(runs):
    axes = axes_of(draw(runs[:1], ["kl"]), "kl")
    table = runs[0].evaluations
    held_out = table[table.split == "held_out"]
    assert (held_out.kl.tolist(), held_out.reward_mean.tolist()) in lines_of(axes)


def test_drift_measured_and_expected(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=20)
    with h5py.File(path, "r+") as file:
        file["evaluation/drift_l2"][:] = np.arange(len(file["evaluation/drift_l2"])) // 2
    run = open_run(path)
    lines = lines_of(axes_of(draw([run], ["drift"]), "drift"))
    assert ([0, 10, 20], [0.0, 1.0, 2.0]) in lines
    assert any(len(y) == 21 and y[0] == 0 and np.all(np.diff(y) > 0) for _, y in lines)


@pytest.mark.render
def test_what_was_not_measured_is_left_out(one):
    titles = {axes.get_title(loc="left") for axes in draw([one]).axes}
    assert PANELS["kl"].title not in titles and PANELS["accuracy"].title not in titles
    with pytest.raises(InputError, match="panel kl"):
        draw([one], ["kl"])


def test_long_curves_are_smoothed_in_front_of_the_data(tmp_path):
    run = open_run(made_up.write_run(tmp_path / "run", generations=100))
    lines = [y for x, y in lines_of(axes_of(draw([run], ["learning"]), "learning")) if len(x) == 100]
    assert run.generations.reward_mean.tolist() in lines
    smooth = next(y for y in lines if y != run.generations.reward_mean.tolist())
    assert np.isclose(smooth[50], run.generations.reward_mean[48:53].mean())


# Many runs


def test_up_to_seven_runs_have_their_own_colours(runs):
    seen = arrange(runs[:7])
    assert [shown.colour for shown in seen.shown] == list(COLOURS) and not seen.means


def test_more_runs_are_coloured_by_group_with_their_mean(runs):
    seen = arrange(runs[:20])
    assert [len(group.runs) for group, _ in seen.means] == [5, 5, 5, 5]
    assert len({shown.colour for shown in seen.shown}) == 4
    axes = axes_of(draw(runs[:20], ["learning"]), "learning")
    five = [run.generations.reward_mean[:20].to_numpy() for run in runs[:5]]
    assert any(len(y) == 20 and np.allclose(y, np.mean(five, axis=0)) for _, y in lines_of(axes))


def test_with_too_many_groups_the_best_stand_out(runs):
    seen = arrange(runs[::5] + runs[1::5])
    coloured = [shown.run for shown in seen.shown if not shown.thin]
    last = {id(run): run.evaluated("held_out")[1][-1] for run in seen.runs}
    assert len(coloured) == len(COLOURS)
    assert min(last[id(run)] for run in coloured) >= sorted(last.values())[-len(COLOURS)]


@pytest.mark.render
@pytest.mark.parametrize("count", [1, 5, 50])
def test_labels_do_not_overlap(runs, count):
    """Tick labels, axis labels, titles and legends of all panels, as they are drawn."""
    figure = draw(runs[:count])
    boxes = text_boxes(figure)
    assert len(boxes) > 20
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across < 2 or down < 2, f"{a!r} and {b!r} overlap"
    whole = figure.bbox
    for text, box in boxes:
        inside = box.x0 > -1 and box.y0 > -1 and box.x1 < whole.x1 + 1 and box.y1 < whole.y1 + 1
        assert inside, f"{text!r} is cut off"


def text_boxes(figure) -> list:
    """(text, box in pixels) of every visible text."""
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    texts = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        left, right = sorted(axes.get_ylim())
        texts += [t for t, x in zip(axes.get_xticklabels(), axes.get_xticks()) if low <= x <= high]
        texts += [t for t, y in zip(axes.get_yticklabels(), axes.get_yticks()) if left <= y <= right]
        texts += [axes._left_title, axes.xaxis.label, axes.yaxis.label]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    for legend in figure.legends:
        texts += [*legend.get_texts(), legend.get_title()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]


def test_nothing_to_plot(tmp_path):
    run = open_run(made_up.write_run(tmp_path / "run", generations=0))
    with pytest.raises(InputError, match="no run has a generation"):
        draw([run])


@pytest.mark.render
def test_a_generation_is_enough(tmp_path):
    draw([open_run(made_up.write_run(tmp_path / "run", generations=1, ranks=1))])


def test_the_same_run_gives_the_same_file(one, tmp_path):
    for name in ("a.svg", "b.svg"):
        save(draw([one], ["learning"]), tmp_path / name, "svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_dollar_in_a_path_or_a_setting_is_a_dollar(tmp_path):
    runs = [
        open_run(made_up.write_run(tmp_path / name, f"task.prompt_column=${name}$", generations=3))
        for name in ("a$^$", "b$^$")
    ]
    save(draw(runs), tmp_path / "figure.svg", "svg", 80)
    assert "a$^$" in (tmp_path / "figure.svg").read_text()


# What is easily misread


def test_generations_are_whole_numbers(one):
    figure = draw([one])
    figure.draw_without_rendering()
    of_generations = [axes for axes in figure.axes if axes.get_xlabel() == "generation"]
    assert len(of_generations) > 2
    for axes in of_generations:
        ticks = axes.get_xticks()
        assert np.array_equal(ticks, np.round(ticks))


def test_one_run_has_one_reward_panel(one, runs):
    def titles(figure) -> list[str]:
        return [axes.get_title(loc="left") for axes in figure.axes]

    alike = {PANELS["answers"].title, PANELS["time"].title}
    assert PANELS["learning"].title in titles(draw([one])) and not alike & set(titles(draw([one])))
    assert alike <= set(titles(draw([one], ["learning", "answers", "time"])))
    assert PANELS["time"].title in titles(draw(runs[:3]))


def test_accuracies_have_standard_errors(tmp_path):
    path = made_up.write_run(tmp_path, generations=4, evaluate_every=2)
    with h5py.File(path, "r+") as file:
        file["evaluation/accuracy"][:] = 1 / 3
    run = open_run(path)
    axes = axes_of(draw([run], ["accuracy"]), "accuracy")
    (bars,) = axes.collections
    (low, high) = np.array(bars.get_segments())[0][:, 1]
    prompts = len(set(run.tables["sample"]["prompt"][run.tables["sample"]["split"] == "held_out"]))
    assert np.isclose(high - low, 200 * np.sqrt(2 / 9 / prompts))
    assert "± standard error" in [text.get_text() for text in axes.get_legend().get_texts()]
