"""mpirun -n N python -m mpies.evaluate, as a user types it: runs, models, samples, KL, run file, refusals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import h5py
import launching
import made_up
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpies.analyze.evaluations import logged_evaluations
from mpies.analyze.run import open_run
from mpies.tasks import conciseness

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

EVALUATE = ("-m", "mpies.evaluate")
GENERATIONS = 3


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A folder with out/run.h5, the run of 2 ranks that measured KL and drift as well."""
    folder = tmp_path_factory.mktemp("trained")
    settings = [
        f"model.path={tiny_model()}",
        "task.name=conciseness",
        "model.dtype=bfloat16",
        "model.device=cpu",
        "es.population=5",
        "es.antithetic=false",
        "es.perturbation=full",
        f"es.generations={GENERATIONS}",
        "es.sigma=0.3",
        "es.alpha=0.3",
        "engine.max_new_tokens=16",
        "run.directory=out",
        "run.evaluate_every=1",
        "run.keep_samples=2",
        "run.kl_samples=3",
        "run.measure_drift=true",
    ]
    ended = launching.mpirun(2, "-m", "mpies.train", *settings, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run's folder, to do with as one likes."""
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


def launched(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on so many ranks; a single one without a launcher."""
    if ranks == 1:
        return launching.python(*EVALUATE, *arguments, cwd=folder)
    return launching.mpirun(ranks, *EVALUATE, *arguments, cwd=folder)


def evaluate(folder: Path, *arguments: str, ranks: int = 2) -> dict:
    """What the command writes as JSON."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    ended = launched(folder, ranks, *arguments, "--json", "result.json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return json.loads(result.read_text(), parse_constant=pytest.fail) | {"screen": ended.stdout}


def columns(path: Path, table: str) -> dict[str, np.ndarray]:
    with h5py.File(path, "r", locking=False) as file:
        return {
            name: d.asstr()[:] if h5py.check_string_dtype(d.dtype) else d[:]
            for name, d in file.get(table, {}).items()
        }


def evaluation(path: Path, generation: int, split: str) -> dict:
    table = columns(path, "evaluation")
    (row,) = np.flatnonzero((table["generation"] == generation) & (table["split"] == split))
    return {name: values[row] for name, values in table.items()}


# What training notes


def test_training_notes_kl_and_drift(trained):
    path = trained / "out" / "run.h5"
    for split in ("train", "held_out"):
        drifts = [evaluation(path, g, split)["drift_l2"] for g in range(GENERATIONS + 1)]
        assert drifts[0] == 0 and len(set(drifts)) == GENERATIONS + 1
    kls = [evaluation(path, g, "held_out")["kl"] for g in range(GENERATIONS + 1)]
    assert kls[0] == 0 and min(kls[1:]) > 0
    assert np.isnan(evaluation(path, 1, "train")["kl"])
    metrics = columns(path, "metric")
    last = (metrics["generation"] == GENERATIONS) & (metrics["split"] == "train")
    parts = {n: m for n, m in zip(metrics["name"][last], metrics["mean"][last]) if n.startswith("drift")}
    assert set(parts) == {f"drift_l2 {g}" for g in ("embedding", "layer 0", "layer 1", "other")}
    assert math.fsum(v * v for v in parts.values()) == pytest.approx(drifts[-1] ** 2)


def test_measuring_changes_no_weights(trained, tmp_path):
    """The same run without KL and drift, on one rank, has the same digests and greedy evaluations."""
    settings = open_run(trained / "out").configs[0].replace("kl_samples: 3", "kl_samples: 0")
    settings = settings.replace("measure_drift: true", "measure_drift: false")
    (tmp_path / "again.yaml").write_text(settings)
    ended = launching.mpirun(1, "-m", "mpies.train", "again.yaml", "run.directory=out", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    with_, without = (columns(f / "out" / "run.h5", "generation")["digest"] for f in (trained, tmp_path))
    np.testing.assert_array_equal(with_, without)
    rows = [columns(f / "out" / "run.h5", "evaluation") for f in (trained, tmp_path)]
    np.testing.assert_array_equal(rows[0]["reward_mean"], rows[1]["reward_mean"])
    assert np.isnan(rows[1]["kl"]).all() and np.isnan(rows[1]["drift_l2"]).all()


# Runs


@pytest.mark.parametrize("generation", ["2", "best"])
def test_a_generation_gets_the_figures_that_training_noted(run, generation):
    path = run / "out" / "run.h5"
    found = evaluate(run, "out/run.h5", "--generation", generation, "--kl", "--drift")
    rewards = [evaluation(path, g, "held_out")["reward_mean"] for g in range(GENERATIONS + 1)]
    number = int(np.argmax(rewards)) if generation == "best" else generation
    assert found["generation"] == int(number)
    for split in ("train", "held_out"):
        noted, figures = evaluation(path, int(number), split), found["splits"][split]["figures"]
        assert figures["reward"]["mean"] == noted["reward_mean"]
        assert figures["accuracy"]["mean"] == noted["accuracy"]
        assert figures["answer_tokens"]["mean"] == noted["answer_tokens"]
        assert found["drift_l2"]["all"] == noted["drift_l2"]
    samples = columns(path, "sample")
    kept = (samples["generation"] == int(number)) & (samples["split"] == "held_out")
    answers = [a["completion"] for a in found["splits"]["held_out"]["answers"]]
    assert answers[:2] == samples["completion"][kept].tolist()
    kl = found["splits"]["held_out"]["figures"]["kl"]["mean"]
    assert kl == evaluation(path, int(number), "held_out")["kl"]
    assert not columns(path, "figure"), "only --log writes"


SAMPLED = ("out", "--split", "held_out", "--samples", "4", "--temperature", "0.8", "--seed", "9", "--kl")


@pytest.fixture(scope="module")
def sampled(trained) -> dict:
    """The run's last generation by 2 ranks; seven batches, which no other number of ranks shares evenly."""
    return evaluate(trained, *SAMPLED, "engine.batch_size=5")


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.long)])
def test_sampled_answers_do_not_depend_on_the_number_of_ranks(run, sampled, ranks):
    """One rank is started without a launcher."""
    found = evaluate(run, *SAMPLED, "engine.batch_size=5", ranks=ranks)
    assert found["splits"] == sampled["splits"]
    assert found["splits"]["held_out"]["figures"]["kl"]["mean"] > 0
    texts = [a["completion"] for a in found["splits"]["held_out"]["answers"]]
    assert len(texts) == 32 and len(set(texts)) > 20


def test_figures_are_those_of_the_answers(sampled):
    split = sampled["splits"]["held_out"]
    rewards = np.array([a["reward"] for a in split["answers"]]).reshape(8, 4)
    shortest = conciseness.HELD_OUT
    lengths = [[abs(len(a["completion"]) - len(shortest[a["prompt"]]))] for a in split["answers"]]
    assert (rewards.ravel() == -np.array(lengths, dtype=float).ravel()).all()
    assert [a["sample"] for a in split["answers"]] == [0, 1, 2, 3] * 8
    reward = split["figures"]["reward"]
    assert reward["mean"] == pytest.approx(rewards.mean())
    assert reward["error"] == pytest.approx(rewards.mean(axis=1).std(ddof=1) / math.sqrt(8))
    assert {"pass@1", "pass@2", "pass@4", "accuracy", "normalised"} < set(split["figures"])
    assert split["figures"]["pass@1"] == pytest.approx(split["figures"]["accuracy"])
    table = sampled["screen"].split("mean +- standard error")[1]
    assert f"{reward['mean']:.4g} +- {reward['error']:.2g}" in table and "pass@4" in table


@pytest.mark.long
def test_other_settings_than_the_runs(run):
    found = evaluate(run, "out", "engine.max_new_tokens=3", "model.dtype=float32", "--split", "train")
    assert found["dtype"] == "float32"
    assert max(a["tokens"] for a in found["splits"]["train"]["answers"]) == 3


# The run file


def test_log(run):
    path = run / "out" / "run.h5"
    before = {t: columns(path, t) for t in ("generation", "member", "evaluation", "sample", "start")}
    greedy = evaluate(run, "out", "--generation", "1", "--kl", "--log")
    sampled = evaluate(run, "out", "--generation", "1", "--samples", "3", "--drift", "--log")
    for table, old in before.items():
        for name, values in columns(path, table).items():
            if (table, name) == ("evaluation", "checksum"):
                continue  # of rows that now have what they lacked
            kept = ~np.isnan(old[name]) if old[name].dtype.kind == "f" else np.ones(values.shape, dtype=bool)
            np.testing.assert_array_equal(values[kept], old[name][kept], err_msg=f"{table}/{name}")
    # What training has not measured is there now.
    kl = greedy["splits"]["train"]["figures"]["kl"]["mean"]
    assert evaluation(path, 1, "train")["kl"] == kl > 0
    figures = columns(path, "figure")
    assert set(figures["generation"]) == {1}
    for result, temperature in ((greedy, 0), (sampled, 1)):
        for split, content in result["splits"].items():
            rows = (figures["temperature"] == temperature) & (figures["split"] == split)
            noted = dict(zip(figures["name"][rows], figures["mean"][rows]))
            expected = {name: figure["mean"] for name, figure in content["figures"].items()}
            expected |= {"drift_l2": sampled["drift_l2"]["all"]} if temperature else {}
            assert {name: noted[name] for name in expected} == expected
            assert set(figures["samples"][rows]) == {3 if temperature else 1}
    answers = columns(path, "answer")
    assert len(answers["prompt"]) == 2 * 2 * (1 + 3), "of two prompts each"
    rows = (answers["temperature"] == 1) & (answers["split"] == "held_out")
    expected = [a["completion"] for a in sampled["splits"]["held_out"]["answers"][:6]]
    assert answers["completion"][rows].tolist() == expected
    with h5py.File(path, "r", locking=False) as file:
        for table in ("figure", "answer"):
            for dataset in file[table].values():
                assert dataset.attrs["description"] and "units" in dataset.attrs
                assert dataset.dims[0][0].name == f"/{table}s"
    # What the analysis makes of it.
    shown = {(e.split, e.decoding): e.figures["reward"][0] for e in logged_evaluations(open_run(path))}
    assert shown == {
        (split, decoding): result["splits"][split]["figures"]["reward"]["mean"]
        for decoding, result in (("greedy", greedy), ("3 samples at T=1, seed 42", sampled))
        for split in ("held_out", "train")
    }


@pytest.mark.long
def test_log_of_a_generation_that_training_did_not_evaluate(run):
    path = run / "out" / "run.h5"
    with h5py.File(path, "r+") as file:
        for table in ("evaluation", "sample", "metric"):
            kept = np.flatnonzero(file[table]["generation"][:] != 1)
            for dataset in file[table].values():
                values = dataset[:][kept]
                dataset.resize(len(kept), axis=0)
                dataset[:] = values
        made_up.seal_all(file)
    evaluate(run, "out", "--generation", "1", "--samples", "2", "--log")
    assert 1 not in columns(path, "evaluation")["generation"], "an evaluation of a run is greedy"
    found = evaluate(run, "out", "--generation", "1", "--log")
    noted = evaluation(path, 1, "held_out")
    assert noted["reward_mean"] == found["splits"]["held_out"]["figures"]["reward"]["mean"]
    assert (columns(path, "sample")["generation"] == 1).sum() == 4


def test_figures_by_other_settings_are_kept_apart_from_the_runs_own(run):
    path = run / "out" / "run.h5"
    before = {table: columns(path, table) for table in ("evaluation", "metric", "sample")}
    evaluate(run, "out", "--generation", "2", "--kl", "--log", "engine.max_new_tokens=3", ranks=1)
    for table, old in before.items():
        for name, values in columns(path, table).items():
            np.testing.assert_array_equal(values, old[name], err_msg=f"{table}/{name}")
    figures = columns(path, "figure")
    assert figures["mean"][figures["name"] == "answer_tokens"].tolist() == [3, 3]


@pytest.mark.long
def test_a_run_goes_on_after_log(run):
    evaluate(run, "out", "--samples", "2", "--log")
    (run / "go.yaml").write_text(open_run(run / "out").configs[-1])
    goes_on = ["run.directory=out", f"es.generations={GENERATIONS + 1}"]
    ended = launching.mpirun(2, "-m", "mpies.train", "go.yaml", *goes_on, cwd=run)
    assert ended.returncode == 0, ended.stderr
    assert len(columns(run / "out" / "run.h5", "figure")["name"]) > 0
    verified = launching.python("-m", "mpies.replay", "out/run.h5", "--verify", cwd=run)
    assert f"{GENERATIONS + 1} of {GENERATIONS + 1}" in verified.stdout


@contextlib.contextmanager
def job_at(folder: Path):
    """What a running job does: it holds the lock."""
    descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def test_while_a_job_runs(run):
    before = (run / "out" / "run.h5").read_bytes()
    with job_at(run / "out"):
        assert evaluate(run, "out", "--split", "train")["generation"] == GENERATIONS
        refused(run, ["out", "--log"], ["--log", "in use by another job", "leave it out"])
    assert (run / "out" / "run.h5").read_bytes() == before


# Models


def test_a_model_and_another_to_compare_with(run, tiny_model, tmp_path):
    """The tuned model's folder gives what the run's last generation gives."""
    settings = [
        "task.name=conciseness",
        "engine.max_new_tokens=16",
        "model.dtype=bfloat16",
        "run.kl_samples=3",
        "--kl",
        "--drift",
    ]
    model = evaluate(run, "out/model", "--initial", str(tiny_model()), *settings)
    last = evaluate(run, "out", "--kl", "--drift")
    figures = [r["splits"]["held_out"]["figures"] for r in (model, last)]
    assert figures[0] == figures[1]
    # The folder holds bfloat16 weights, the run float32 ones.
    tuned, initial = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)
        for f in (run / "out/model", tiny_model())
    )
    pairs = zip(tuned.parameters(), initial.parameters())
    moved = math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))
    assert model["drift_l2"]["all"] == pytest.approx(moved)
    assert model["run_uuid"] is None and last["run_uuid"]


# Refusals


def refused(folder: Path, arguments: list[str], says: list[str], ranks: int = 2) -> None:
    ended = launched(folder, ranks, *arguments)
    assert ended.returncode == 2, ended.stderr
    (problem,) = launching.problems(ended.stderr)
    assert all(part in problem for part in says), problem
    assert "Traceback" not in ended.stderr and "usage" not in ended.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], ["RUN|MODEL", "--help"]),
        (["out", "--samples", "0"], ["--samples", "1 to 1000000"]),
        (["out", "--temperature", "0"], ["--temperature", "greedy"]),
        (["out", "--generation", "9"], ["--generation", "9", "0 to 3"]),
        (["out", "es.sigma=1"], ["es.sigma=1", "cannot be changed"]),
        (["out", "model.master=live"], ["model.master=live", "cannot be changed"]),
        (["out", "--log", "--kl", "--initial", "out/model"], ["--log", "--initial"]),
        (["out", "other.yaml"], ["other.yaml", "section.key=value"]),
        (["out", "engine.batch=3"], ["engine.batch", "engine.batch_size"]),
        (["out", "--json", "none/x.json"], ["--json", "none/x.json"]),
        (["out", "model.path=none"], ["model.path", "none"]),
        (["none.h5"], ["none.h5", "no such file"]),
        (["none/model"], ["model.path", "none/model"]),
        (["out/model", "--log"], ["--log", "no run file"]),
        (["out/model", "--generation", "1"], ["--generation", "no run file"]),
        (["out/model", "--kl"], ["--kl", "--initial"]),
        (["out", "--log", "task.seed=7", "task.name=countdown"], ["task.train_data", "digest"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_refused(run, arguments, says):
    refused(run, arguments, says, ranks=3 if arguments in (["out", "--samples", "0"], ["none/model"]) else 1)


def test_help_starts_no_mpi():
    ended = launching.python("-X", "importtime", *EVALUATE, "--help")
    assert ended.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in ended.stderr.splitlines()}
    assert "mpies.evaluate.command" in imported
    assert not imported & {"mpi4py", "mpi4py.MPI", "torch", "transformers"}
    assert re.search(r"mpirun -n \d+ python -m mpies.evaluate .*--samples", ended.stdout)
