"""The command's measurements on one rank, against what training logged and direct calls."""

from __future__ import annotations

import math
from dataclasses import asdict

import h5py
import pytest
import small
import torch

from mpies.errors import RefusedError, StorageError
from mpies.evaluate.command import parse
from mpies.evaluate.measuring import PAPER_KL_SAMPLES, Measurement, assemble, measure
from mpies.evaluate.report import Report
from mpies.evaluate.subject import open_subject
from mpies.measure.evaluation import FIRST_HELD_OUT, Sampling
from mpies.measure.kl import estimate_kl
from mpies.runfile import read_history

pytestmark = pytest.mark.lengthy


def measurement_of(run: small.Runs, *given: str, subject: str | None = None) -> Measurement:
    options = parse([subject or str(run.folder), *given])
    log, found = open_subject(run.comm, options)
    if log:
        log.close()
    said: list[str] = []
    measurement = assemble(run.comm, options, found, said.append)
    assert said[-1:] == [f"loading {found.settings.model.path} ..."]
    return measurement


def report_of(run: small.Runs, *given: str, subject: str | None = None) -> Report:
    return measure(measurement_of(run, *given, subject=subject))


def figures(report: Report) -> dict[str, dict[str, float]]:
    return {s.name: {name: f.mean for name, f in s.figures.items()} for s in report.splits}


def logged(run: small.Runs, generation: int) -> dict[str, dict[str, float]]:
    """Split -> what training noted of that generation."""
    with h5py.File(run.folder / "run.h5", "r", locking=False) as file:
        table = file["evaluation"]
        rows = [i for i, g in enumerate(table["generation"][:]) if g == generation]
        names = ("reward_mean", "kl", "answer_tokens", "drift_l2")
        return {table["split"].asstr()[i]: {name: table[name][i] for name in names} for i in rows}


@pytest.mark.parametrize("generation", [0, 2])
def test_a_generations_figures_are_those_that_training_noted(run, generation):
    small.calls.clear()
    report = report_of(run, "--generation", str(generation), "--kl", "--drift")
    digests = read_history(run.folder / "run.h5")
    digest = int(digests.digest[generation - 1]) if generation else digests.model_digest
    assert report.subject.digest == f"{digest:016x}"
    for split, noted in logged(run, generation).items():
        found = figures(report)[split]
        assert (found["reward"], found["answer_tokens"]) == (noted["reward_mean"], noted["answer_tokens"])
        assert report.drift["all"] == noted["drift_l2"]
        if split == "held_out":  # where training measures it, too
            assert found["kl"] == noted["kl"]
    steps = {(call["trainer_state"].global_step, call["trainer_state"].max_steps) for call in small.calls}
    assert steps == {(generation, 3)}


def test_facts_of_a_run(run):
    measurement = measurement_of(run, "--generation", "1")
    facts, history = asdict(measure(measurement).subject), read_history(run.folder / "run.h5")
    assert facts == {
        "model": str(run.model),
        "run_file": str(run.folder / "run.h5"),
        "run_uuid": history.run_uuid,
        "generation": 1,
        "digest": f"{int(history.digest[0]):016x}",
        "dtype": "float32",
        "task": "custom",
        "data_digest": history.data_digest,
        "max_new_tokens": 4,
        "initial": None,
    }
    weights = measurement.replica.weights
    assert all(torch.equal(weights.live[name], base) for name, base in weights.base.items())


def test_a_model_gets_the_settings_figures(run):
    """The tuned model's folder has what the run's last generation has."""
    own = [word for word in run.arguments(1) if not word.startswith(("model.path", "run.directory"))]
    model = str(run.folder / "model")
    report = report_of(run, *own, subject=model)
    assert figures(report)["train"]["reward"] == logged(run, 3)["train"]["reward_mean"]
    assert report.subject.model == model
    assert {
        name: getattr(report.subject, name) for name in ("run_file", "run_uuid", "generation", "initial")
    } == dict.fromkeys(("run_file", "run_uuid", "generation", "initial"))


def test_a_model_is_compared_with_the_one_that_is_named(run):
    own = [word for word in run.arguments(1) if not word.startswith(("model.path", "run.directory"))]
    report = report_of(run, *own, "--drift", "--initial", str(run.model), subject=str(run.folder / "model"))
    assert report.drift["all"] == pytest.approx(logged(run, 3)["train"]["drift_l2"])
    assert report.subject.initial == str(run.model)
    assert report_of(run, "--drift", "--generation", "3").subject.initial == str(run.model)


@pytest.mark.parametrize(
    "given, splits",
    [([], ["train", "held_out"]), (["--split", "train"], ["train"]), (["--split", "held_out"], ["held_out"])],
)
def test_splits(run, given, splits):
    report = report_of(run, *given)
    assert [split.name for split in report.splits] == splits
    assert report.drift == {} and all("kl" not in found for found in figures(report).values())


def test_a_split_without_prompts_is_refused(run):
    with pytest.raises(RefusedError, match=r"^--split: given held_out, but this task has only train prompts"):
        measurement_of(run, "task.eval_data=", "--split", "held_out")


@pytest.mark.parametrize(
    "given, samples, temperature, seed",
    [
        (["--samples", "3"], 3, 1.0, 42),
        (["--temperature", "0.5"], 1, 0.5, 42),
        (["--samples", "2", "--temperature", "0.7", "--seed", "0"], 2, 0.7, 0),
    ],
)
def test_sampled_answers(run, given, samples, temperature, seed):
    """Held-out prompts have random numbers of their own."""
    measurement = measurement_of(run, *given)
    report = measure(measurement)
    for split, first in zip(report.splits, (0, FIRST_HELD_OUT), strict=True):
        assert split.sampling == Sampling(samples, temperature, seed, first)
        rows = measurement.rows[split.name]
        prompts = [row["prompt"] for row in rows for _ in range(samples)]
        expected = measurement.replica.engine.sample(prompts, split.sampling.draws(len(rows)))
        assert split.evaluation.completions == expected.texts


def test_kl_of_sampled_answers_is_measured_on_them(run):
    measurement = measurement_of(run, "--samples", "3", "--temperature", "0.7", "--kl")
    report = measure(measurement)
    for split in report.splits:
        batch, replica = measurement.subject.settings.engine.batch_size, measurement.replica
        rows = measurement.rows[split.name]
        expected = estimate_kl(run.comm, replica, replica.initial, rows, batch, split.sampling)
        assert split.figures["kl"] == expected and expected.mean > 0


@pytest.mark.parametrize("noted, samples", [(3, 3), (0, PAPER_KL_SAMPLES)])
def test_kl_of_greedy_answers_is_estimated_as_in_training(run, noted, samples):
    """With the run's number of samples, or else the paper's, of its first prompts, at temperature 1."""
    measurement = measurement_of(run, "--kl", f"run.kl_samples={noted}", "run.kl_prompts=1", "--seed", "9")
    split = measure(measurement).splits[0]
    assert split.sampling is None
    batch, replica = measurement.subject.settings.engine.batch_size, measurement.replica
    sampling = Sampling(samples, 1.0, 9, 0)
    expected = estimate_kl(run.comm, replica, replica.initial, measurement.rows["train"][:1], batch, sampling)
    assert split.figures["kl"].mean == expected.mean > 0 and math.isnan(expected.error)


def test_figures_for_the_run_file_need_the_runs_data(run):
    for path in run.folder.parent.glob("*.jsonl"):
        path.write_text('{"prompt": "another", "tags": []}\n')
    other = [f"task.train_data={path}" for path in run.folder.parent.glob("train.jsonl")]
    with pytest.raises(RefusedError, match=r"^task\.train_data: the data, .* the run"):
        measurement_of(run, *other, "--log")
    assert report_of(run, *other, "--split", "train").splits[0].evaluation.rows[0]["prompt"] == "another"


def test_other_prompts_and_rewards_are_refused_unless_they_are_named(alone, tiny_model, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def reward(completions, **columns):\n    return [0.5 for _ in completions]\n")
    with small.Runs(alone, tiny_model(), tmp_path) as run:
        assert run.train(1, task__reward=f"{rewards}:reward") == 0
        measurement_of(run)
        rewards.write_text(rewards.read_text() + "# changed\n")
        with pytest.raises(RefusedError, match=r"^task\.reward: the file of .* give task\.reward=\.\.\.$"):
            measurement_of(run)
        named = [f"task.reward={rewards}:reward"]
        measurement_of(run, *named)
        for path in tmp_path.glob("*.jsonl"):
            path.write_text('{"prompt": "another", "tags": []}\n')
        with pytest.raises(RefusedError, match=r"^task\.train_data: .* give task\.train_data=\.\.\.$"):
            measurement_of(run, *named)
        named.append(f"task.train_data={tmp_path / 'train.jsonl'}")
        assert report_of(run, *named).splits[0].evaluation.rows[0]["prompt"] == "another"


def test_another_initial_model_is_refused(run, tiny_model):
    with pytest.raises(RefusedError, match=r"^model\.path: .* the run began with"):
        measurement_of(run, f"model.path={tiny_model(seed=1)}")


@pytest.mark.parametrize("master", ["float32", "live"])
def test_the_live_dtype_may_be_another_unless_the_base_is_kept_in_it(alone, tiny_model, tmp_path, master):
    with small.Runs(alone, tiny_model(), tmp_path) as run:
        assert run.train(1, model__dtype="bfloat16", model__master=master, es__anchor_decay=0.1) == 0
        digest = int(read_history(run.folder / "run.h5").digest[0])
        assert report_of(run).subject.digest == f"{digest:016x}", "the anchor's pull was replayed"
        if master == "float32":
            report = report_of(run, "model.dtype=float32")
            assert (report.subject.dtype, report.subject.digest) == ("float32", f"{digest:016x}")
        else:
            with pytest.raises(RefusedError, match=r"^model\.dtype: given float32, but the run's base"):
                report_of(run, "model.dtype=float32")


def test_figures_that_cannot_be_written_leave_nothing_behind(run, tmp_path):
    report = report_of(run, "--split", "held_out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match=r"^--json: cannot write .*taken \("):
        report.write_json(tmp_path / "taken")
    assert not list(tmp_path.glob("taken?*"))
