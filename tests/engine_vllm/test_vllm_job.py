"""Jobs with the vLLM engine, as users start them: the same digests on one rank and two, resumed, replayed."""

from __future__ import annotations

import json
from pathlib import Path

import games
import h5py
import launching
import pytest

SETTINGS = [
    "task.name=conciseness",
    "engine.name=vllm",
    "engine.max_new_tokens=12",
    "engine.batch_size=4",
    "es.perturbation=full",
    "es.population=4",
    "es.sigma=0.05",
    "es.alpha=0.05",
    "model.device=cpu",
    "model.dtype=float32",
    "run.kl_samples=0",
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(kind="llama", tied=True, hidden=128)


LIKELY = {"expects": "first", "reward": "likely"}
LOW_RANK = ["es.perturbation=lowrank", "es.block=2", "es.rank=2"]


def train(ranks: int, model, directory, generations: int, *changes: str):
    given = [f"model.path={model}", f"run.directory={directory}", f"es.generations={generations}", *changes]
    ended = launching.mpirun(ranks, "-m", "mpies.train", *SETTINGS, *given, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, "vLLM is quiet"
    assert not {"INFO", "WARNING"} & set(ended.stdout.split())
    with h5py.File(directory / "run.h5", locking=False) as file:
        versions = file["start/versions"].asstr()[0]
        return file["generation/digest"][:].tolist(), file["member/reward"][:].tolist(), versions


@pytest.mark.parametrize("changes", [[], LOW_RANK], ids=["full", "lowrank"])
def test_runs_are_the_same_on_any_number_of_ranks_resumed_and_replayed(model, tmp_path, changes):
    digests, rewards, versions = train(2, model, tmp_path / "two", 3, *changes)
    assert len(set(digests)) == 3 and len({str(row) for row in rewards}) == 3, "it moves"
    assert json.loads(versions)["vllm"]
    train(1, model, tmp_path / "one", 1, *changes)
    assert train(1, model, tmp_path / "one", 3, *changes)[:2] == (digests, rewards)
    replayed = launching.python("-m", "mpies.replay", tmp_path / "two" / "run.h5", "--verify", timeout=200)
    assert replayed.returncode == 0, replayed.stderr
    assert "3 of 3 generations' digests agree" in replayed.stdout


def test_an_environment_is_played_as_with_hf_on_any_number_of_ranks(model, tmp_path):
    """Conversations of some turns, of which vLLM keeps what it has read."""
    file = Path(games.__file__)
    given = ["task.name=custom", f"task.environment={file}:Echo", "task.train_size=2", "task.eval_size=1"]
    given += [*LOW_RANK, "task.episode_tokens=400", "engine.max_new_tokens=40", "engine.batch_size=2"]
    digests, rewards, _ = train(2, model, tmp_path / "vllm", 2, *given)
    assert train(1, model, tmp_path / "hf", 2, *given, "engine.name=hf")[:2] == (digests, rewards)
    assert len({*rewards[0]}) > 1


def test_evaluation_and_check(model, tmp_path):
    """Sampled answers, KL to the initial model and the check's forecast, with vLLM as with hf."""
    json_of = {}
    for engine in ("vllm", "hf"):
        file = tmp_path / f"{engine}.json"
        given = [
            *SETTINGS,
            f"engine.name={engine}",
            "--samples",
            "2",
            "--kl",
            "--drift",
            "--initial",
            model,
            "--json",
            file,
        ]
        ended = launching.mpirun(1, "-m", "mpies.evaluate", model, *given, timeout=280)
        assert ended.returncode == 0, ended.stderr
        json_of[engine] = json.loads(file.read_text())
    assert answers(json_of["vllm"]) == answers(json_of["hf"])
    given = [*SETTINGS, f"model.path={model}", f"run.directory={tmp_path / 'run'}", "es.generations=2"]
    ended = launching.mpirun(1, "-m", "mpies.check", *given, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert "evaluation" in ended.stdout


def answers(report: dict) -> str:
    return json.dumps(report["splits"], sort_keys=True)


def test_low_rank_learns_as_with_the_hf_engine(model, tmp_path):
    """In float32 members answer the same: so rewards are equal, and then weights are, bit for bit."""
    changes = [*LOW_RANK, "es.population=6", "es.block=3", "engine.batch_size=32"]
    runs = [train(1, model, tmp_path / name, 3, *changes, f"engine.name={name}") for name in ("vllm", "hf")]
    (digests, rewards, _), (expected, theirs, _) = runs
    assert rewards == theirs and digests == expected
    assert len({reward for row in rewards for reward in row}) > 3, "members answer differently"


@pytest.mark.parametrize("changes", [[], LOW_RANK], ids=["full", "lowrank"])
def test_probabilities_as_rewards_are_those_of_the_hf_engine_on_any_ranks(model, tmp_path, changes):
    """Up to rounding, which the two engines do otherwise; so the weights of one are compared."""
    (tmp_path / "likely.py").write_text(
        "def first(completions, answer, **columns):\n"
        "    return [(text[:2], right) for text, right in zip(completions, answer)]\n"
        "def likely(log_probabilities, **columns):\n"
        "    return [float(sum(tokens)) for tokens in log_probabilities]\n"
    )
    rows = [{"prompt": "3 + 5 =", "answer": "8."}, {"prompt": "Say it", "answer": " now, or never"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["task.name=custom", f"task.train_data={tmp_path / 'rows.jsonl'}", "task.chat_template=false"]
    given += [f"task.{key}={tmp_path / 'likely.py'}:{name}" for key, name in LIKELY.items()]
    digests, rewards, _ = train(2, model, tmp_path / "two", 2, *given, *changes)
    if changes:  # without, the hf engine reads for vLLM
        assert train(1, model, tmp_path / "one", 2, *given, *changes)[:2] == (digests, rewards)
    _, others, _ = train(1, model, tmp_path / "hf", 2, *given, *changes, "engine.name=hf")
    assert rewards[0] == pytest.approx(others[0], abs=1e-4)
    assert len(set(rewards[0])) == 4
