"""What should have been in answers: its log-probabilities are each member's own."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import small
import torch

from jobs import arguments, assert_same_run, refused, train
from mpies import config
from mpies.engines.base import Draws
from mpies.errors import InputError
from mpies.es.population import Population
from mpies.tasks import expected

SIGMA = 0.1
REWARDS = """
def chances(log_probabilities, **columns):
    return [0.0 if tokens is None else float(sum(tokens)) for tokens in log_probabilities]
def halves(completions, answer, **columns):
    pairs = zip(completions, answer)
    return [(text[: len(text) // 2], known) if known else None for text, known in pairs]
"""
ROWS = [
    {"prompt": "a b", "answer": "c d"},
    {"prompt": "b c d e", "answer": None},
    {"prompt": "c", "answer": "a"},
    {"prompt": "d a a", "answer": "b c d e f"},
]


def settings(folder):
    return {
        "task__name": "custom",
        "task__reward": f"{folder}/likely.py:chances",
        "task__expects": f"{folder}/likely.py:halves",
        "task__train_data": folder / "rows.jsonl",
        "task__eval_data": "",
        "task__chat_template": "false",
        "engine__max_new_tokens": 6,
    }


@pytest.fixture
def runs_of(alone, tiny_model, tmp_path):
    """runs_of(setting=value, ...) -> a replica; and its task's file of rewards."""
    (tmp_path / "likely.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        yield lambda **changes: runs.build(**(settings(tmp_path) | changes))


@pytest.mark.launch
@pytest.mark.parametrize(
    "perturbation, dtype",
    [pytest.param("full", "float32", marks=pytest.mark.long), ("lowrank", "bfloat16")],
)
def test_a_run_does_not_depend_on_the_ranks(runs_of, tiny_model, tmp_path, perturbation, dtype):
    changes = settings(tmp_path) | {
        "model__dtype": dtype,
        "es__perturbation": perturbation,
        "es__population": 6,
    }
    if perturbation == "lowrank":
        changes["es__block"] = 2
    for ranks in (1, 3):
        train(ranks, *arguments(tiny_model(), tmp_path / f"{ranks}", 3, **changes))
    assert_same_run(tmp_path / "1", tmp_path / "3", 3)
    with h5py.File(tmp_path / "1" / "run.h5") as file:
        assert len(set(file["member/reward"][:].flat)) == 18
        assert set(json.loads(file["start/rewards"][0])) == {
            changes["task__reward"],
            changes["task__expects"],
        }
    code = (tmp_path / "likely.py").read_text()
    (tmp_path / "likely.py").write_text(code.replace("sum(tokens)", "min(tokens)"))
    (line,) = refused(*arguments(tiny_model(), tmp_path / "1", 4, **changes))
    assert "likely.py" in line and "run.changed_reward=accept" in line


def by_own_weights(replica, member, text: str, kept: str, wanted: str) -> float:
    """The sum of what one forward pass with the member's weights finds, without cache or other rows."""
    weights, ids = replica.weights, replica.tokenizer(text + kept, add_special_tokens=True).input_ids
    whole = replica.tokenizer(text + kept + wanted, add_special_tokens=True).input_ids
    names = weights.base if member else ()
    own = {
        name: weights.updated(
            name, np.array([member.seed], np.uint64), np.array([SIGMA * member.sign], np.float32)
        ).to(weights.dtype)
        for name in names
    }
    with weights.lending(own), torch.inference_mode():
        logits = replica.model(torch.tensor([whole]), use_cache=False).logits[0]
    chances = torch.log_softmax(logits.float(), dim=-1)
    return sum(float(chances[i - 1, whole[i]]) for i in range(len(ids), len(whole)))


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("perturbation, members", [("full", 1), ("lowrank", 4)])
def test_each_member_is_asked_by_its_own_weights(runs_of, perturbation, members, batch):
    replica = runs_of(es__perturbation=perturbation, es__block=members, engine__batch_size=batch)
    block = Population(members, seed=3).members(0)
    replica.perturbation.set(block, SIGMA)
    played = replica.task.play(replica.engine, replica.task.starts(0), members)
    replica.perturbation.clear()
    for member, made in zip(block, played, strict=True):
        for episode, reward in zip(made.episodes, made.scores.rewards, strict=True):
            text, wanted = episode.text, episode.start.row["answer"]
            if wanted is None:
                assert reward == 0
                continue
            right = by_own_weights(replica, member, episode.prompt, text[: len(text) // 2], wanted)
            assert reward == pytest.approx(right, abs=1e-4) and right < -1


def test_the_unperturbed_model_is_asked_too_and_so_are_sampled_answers(runs_of):
    replica = runs_of()
    starts = replica.task.starts(0)
    draws = Draws(1, 1.0, np.arange(len(starts), dtype=np.uint64))
    for given in (None, draws):
        (made,) = replica.task.play(replica.engine, starts, draws=given)
        text = made.episodes[3].text
        right = by_own_weights(replica, None, "d a a", text[: len(text) // 2], "b c d e f")
        assert made.scores.rewards[3] == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize(
    "returned, said",
    [
        ("text", "returned 'text' (str); needed is a list with a pair of texts"),
        ([("a", "b")], "needed is a list with a pair of texts (kept, expected), or None, for each of 2"),
        ([("a", "b"), ("a", "")], "('a', '') (tuple) for answer 2"),
        ([("a", "b"), ("a", 3)], "('a', 3) (tuple) for answer 2"),
        ([("a", "b"), "ab"], "'ab' (str) for answer 2"),
        ([("a", "b"), ("a", "b", "c")], "for answer 2"),
    ],
)
def test_what_is_no_pair_of_texts_is_refused(returned, said):
    with pytest.raises(InputError) as caught:
        expected.continuations(returned, 2)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_pairs_and_none_are_taken():
    made = expected.continuations([["a", "b"], None], 2)
    assert made == [expected.Continuation("a", "b"), None]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"task.expects": "file.py"}, "task.expects: given 'file.py', allowed is FILE.py:FUNCTION"),
        ({"task.reward": "", "task.name": "questions"}, "there is no task.reward to make use of"),
        ({"task.environment": "games.py:Game"}, "allowed is none for episodes of several turns"),
    ],
)
def test_settings_that_make_no_use_of_it_are_refused(changes, said):
    given = {"task.expects": "a.py:b", "task.reward": "a.py:c", "task.train_data": "x.jsonl"} | changes
    with pytest.raises(InputError) as caught:
        config.load([f"{key}={value}" for key, value in given.items() if value])
    assert said in str(caught.value)


def test_functions_that_cannot_be_one_are_refused(tmp_path):
    (tmp_path / "file.py").write_text("def narrow(prompts): return []\n")
    with pytest.raises(InputError, match=r"task.expects: .*narrow does not take every column"):
        expected.load(f"{tmp_path}/file.py:narrow")


def test_what_has_no_room_is_not_asked(runs_of):
    replica = runs_of()
    asked = [expected.Continuation("a " * 5000, "b"), expected.Continuation("a", "b")]
    for members in (None, [0, 0]):
        long, short = expected.read(replica.engine, ["a b", "a"], asked, members)
        assert long is None and len(short) >= 1


def test_a_text_without_tokens_of_its_own_is_refused(runs_of, monkeypatch):
    replica = runs_of()
    monkeypatch.setattr(replica.engine.text, "continue_with", lambda kept, text: ([3, 4], 2))
    with pytest.raises(InputError, match=r"task.expects: the text 'b' .* has no tokens of its own"):
        expected.read(replica.engine, ["a b"], [expected.Continuation("a", "b")], None)
