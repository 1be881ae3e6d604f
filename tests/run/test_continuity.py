"""What stays while a run goes on: its reward functions are known by their files' digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import small

from mpies.errors import RefusedError
from mpies.run.continuity import changed_rewards
from mpies.runfile import open_for_reading, read_history

LENGTH = "def score(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
OTHER = LENGTH.replace("-float", "float")


@pytest.fixture
def rewards(tmp_path) -> Path:
    path = tmp_path / "here" / "rewards.py"
    path.parent.mkdir()
    path.write_text(LENGTH)
    return path


def noted(runs: small.Runs) -> list[dict[str, str]]:
    """What the run file has of the rewards, by start."""
    with open_for_reading(runs.folder / "run.h5") as file:
        return [json.loads(text) for text in file["start/rewards"].asstr()[:]]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_run_file_and_the_screen_name_the_function_and_its_file(runs, rewards, capsys):
    assert runs.train(1, task__reward=f"{rewards}:score") == 0
    assert noted(runs) == [{f"{rewards}:score": digest(rewards)}]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  reward ")]
    assert line.split() == ["reward", f"{rewards}:score", "(SHA-256", f"{digest(rewards)[:16]})"]


def test_a_function_of_a_module_is_known_by_its_file(runs):
    assert runs.train(1) == 0
    assert noted(runs) == [{"small:reward": digest(Path(small.__file__))}]


def test_another_function_under_the_same_name_is_refused_unless_that_is_wanted(runs, rewards):
    named = {"task__reward": f"{rewards}:score"}
    assert runs.train(1, **named) == 0
    first = digest(rewards)
    rewards.write_text(OTHER)
    with pytest.raises(RefusedError) as refused:
        runs.train(2, **named)
    said = str(refused.value)
    assert said.startswith(f"task.reward: the file of {rewards}:score has SHA-256 {digest(rewards)[:16]}, ")
    assert first[:16] in said and "run.changed_reward=accept" in said and len(said.splitlines()) == 1
    assert len(noted(runs)) == 1
    assert runs.train(2, **named, run__changed_reward="accept") == 0
    assert [start[f"{rewards}:score"] for start in noted(runs)] == [first, digest(rewards)]
    assert runs.train(3, **named) == 0, "it is what the run went on with last"


def test_a_file_may_lie_elsewhere_if_it_is_the_same(runs, rewards, tmp_path):
    assert runs.train(1, task__reward=f"{rewards}:score") == 0
    moved = rewards.rename(tmp_path / "rewards.py")
    assert runs.train(2, task__reward=f"{moved}:score") == 0
    moved.write_text(OTHER)
    with pytest.raises(RefusedError, match=r"^task\.reward: the file of .* has SHA-256 "):
        runs.train(3, task__reward=f"{moved}:score")


def test_another_function_or_weight_is_another_setting(runs, rewards):
    rewards.write_text(LENGTH + OTHER.replace("score", "other"))
    assert runs.train(1, task__reward=f"{rewards}:score") == 0
    for reward in (f"{rewards}:other", f"{{{rewards}:score: 0.5}}"):
        with pytest.raises(RefusedError, match=r"^task\.reward: the run was begun with "):
            runs.train(2, task__reward=reward)


def test_of_a_run_that_an_earlier_version_began_no_reward_is_known(finished):
    history = read_history(finished / "run.h5")
    assert changed_rewards(history, {"small:reward": "f" * 64}) == history.reward_digests != {}
    history.reward_digests.clear()
    assert changed_rewards(history, {"small:reward": "f" * 64}) == {}


@pytest.mark.parametrize("kind, told", [("constant", False), ("linear", True)])
def test_a_schedule_that_is_stretched_is_told(runs, capsys, kind, told):
    settings = {"es__alpha": 0.01, "es__alpha_schedule": kind, "es__alpha_end": 0.1}
    assert runs.train(3, **settings) == 0
    capsys.readouterr()
    assert runs.train(5, **settings) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is stretched" in line]
    expected = (
        "warning: es.generations: es.alpha_schedule=linear is stretched to 5 generations, so that alpha goes"
        " on with 0.00325, where it was 0.001"
    )
    assert lines == ([expected] if told else [])
