"""The conciseness task: the paper's prompts and reward, and what becomes of answers without a score."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mpies import config
from mpies.errors import InputError
from mpies.tasks import making
from mpies.tasks.base import member_reward
from mpies.tasks.conciseness import holds, reward

NAN, INF = math.nan, math.inf

PAPER_TRAIN = [
    ("Solve: 3 + 5 =", "8"),
    ("If all birds can fly and penguins are birds, can penguins fly?", "No"),
]
PAPER_HELD_OUT = [
    ("What is the capital of France?", "Paris"),
    ("Calculate: 12 x 7 =", "84"),
    ("Is the statement 'All cats are mammals' true or false?", "True"),
    ("What comes next in the sequence: 2, 4, 6, 8, ?", "10"),
    ("Translate 'Hello' to Spanish:", "Hola"),
    ("What is 15% of 200?", "30"),
    ("Name one primary color:", "Red"),
    ("How many days are in a week?", "7"),
]


@pytest.fixture
def task():
    return making.make(config.TaskSettings())


def with_reward(task, rewards):
    """The task with a reward function that returns these."""
    return dataclasses.replace(task, reward=lambda prompts, completions, **columns: rewards)


def test_prompts_are_the_papers(task):
    assert task.name == "conciseness"
    assert [(row["prompt"], row["answer"]) for row in task.train] == PAPER_TRAIN
    assert [(row["prompt"], row["answer"]) for row in task.held_out] == PAPER_HELD_OUT


@pytest.mark.parametrize(
    "completion, answer, expected",
    [
        ("8", "8", 0),
        ("9", "8", 0),  # only the length counts
        ("", "No", -2),
        ("N", "No", -1),
        ("3 + 5 = 8.", "8", -9),
        ("Paris", "Paris", 0),
        ("The capital of France is Paris.", "Paris", -26),
        (" 8\n", "8", -2),  # white space is characters, too
        ("é€😀", "8", -2),  # characters, not bytes
    ],
)
def test_reward_by_hand(completion, answer, expected):
    (made,) = reward(["the prompt has no part in it"], [completion], answer=[answer])
    assert made == expected and isinstance(made, float)


def test_reward_of_several_answers(task):
    made = reward([row["prompt"] for row in task.train], ["8", "No, they cannot."], answer=["8", "No"])
    assert made == [0, -14]


def test_score(task):
    made = task.score(task.held_out, ["Paris"] * 8)
    assert made.dtype == np.float64
    assert made.tolist() == [0, -3, -1, -3, -1, -3, -2, -4]


def test_reward_function_gets_prompts_completions_and_columns(task):
    """The signature of TRL's GRPOTrainer."""
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1.0, 2.0]

    rows = [{"prompt": "a", "answer": "x", "weight": 1}, {"prompt": "b", "answer": "y", "weight": 2}]
    made = dataclasses.replace(task, reward=spy).score(rows, ["one", "two"], [[5], [6, 7]])
    assert made.tolist() == [1, 2]
    assert {
        name: seen[name] for name in seen if name not in ("trainer_state", "log_extra", "log_metric")
    } == {
        "prompts": ["a", "b"],
        "completions": ["one", "two"],
        "completion_ids": [[5], [6, 7]],
        "answer": ["x", "y"],
        "weight": [1, 2],
    }
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (0, 0)


def test_a_reward_that_changes_what_it_gets_changes_nothing(task):
    """Or the ranks' rows would part."""

    def vandal(prompts, completions, words, **columns):
        prompts[0][0]["content"] = "changed"
        words[0].append("changed")
        return [0.0]

    rows = [{"prompt": [{"role": "user", "content": "a"}], "words": ["b"]}]
    dataclasses.replace(task, reward=vandal).score(rows, ["answer"])
    assert rows == [{"prompt": [{"role": "user", "content": "a"}], "words": ["b"]}]


@pytest.mark.parametrize(
    "rewards", [[None, 1.0], [NAN, 1.0], [INF, 1.0], [-INF, 1.0], [np.float32("nan"), 1]]
)
def test_what_is_no_number_was_not_scored(task, rewards):
    made = with_reward(task, rewards).score(task.train, ["", ""])
    assert math.isnan(made[0]) and made[1] == 1


@pytest.mark.parametrize("rewards", [[1, True], [np.float64(1), np.int32(1)], np.ones(2)])
def test_any_kind_of_number_will_do(task, rewards):
    made = with_reward(task, rewards).score(task.train, ["", ""])
    assert made.dtype == np.float64 and made.tolist() == [1, 1]


@pytest.mark.parametrize("rewards", [None, 1.0, ["good", "bad"], [[1.0], [2.0, 3.0]]])
def test_rewards_that_are_no_numbers_are_an_error(task, rewards):
    with pytest.raises(
        InputError, match=r"the reward function of task conciseness returned .*needed is a list"
    ):
        with_reward(task, rewards).score(task.train, ["", ""])


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, 2.0, 3.0]])
def test_wrong_number_of_rewards_is_an_error(task, rewards):
    with pytest.raises(InputError, match=rf"task conciseness returned {len(rewards)} rewards; needed"):
        with_reward(task, rewards).score(task.train, ["", ""])


def test_errors_of_a_reward_function_are_not_hidden(task):
    def broken(prompts, completions, **columns):
        raise ZeroDivisionError("in the user's code")

    with pytest.raises(ZeroDivisionError, match="in the user's code"):
        dataclasses.replace(task, reward=broken).score(task.train, ["", ""])


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([-3.0], -3),
        ([-8.0, 0.0], -4),
        ([0.1] * 10, 0.1),  # which a plain sum misses by one bit
        ([1e16, 1.0, -1e16], 1 / 3),
    ],
)
def test_member_reward_is_the_exact_mean(rewards, expected):
    assert member_reward(np.array(rewards)) == expected


def test_member_reward_does_not_depend_on_the_order():
    rewards = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-10, 10).repeat(10)
    made = {member_reward(np.random.default_rng(seed).permutation(rewards)) for seed in range(20)}
    assert len(made) == 1


@pytest.mark.parametrize("rewards", [[NAN], [1.0, NAN], [NAN, NAN]])
def test_member_with_an_answer_without_score_has_none(rewards):
    assert math.isnan(member_reward(np.array(rewards)))


# What shows that the reward is hacked


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("Paris", "Paris"),
        ("It is paris.", "Paris"),
        ("No, they cannot.", "No"),
        ("3 + 5 = 8", "8"),
        ("3 + 5 = 8.", "8"),
        ("(8)", "8"),
        ("**8**", "8"),
        ("10, 12", "10"),
        ("15% of 200 is 30!", "30"),
    ],
)
def test_an_answer_is_held(completion, answer):
    assert holds(completion, answer)


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("", "8"),
        ("18", "8"),
        ("8.5", "8"),
        ("0.8", "8"),
        ("1,8", "8"),
        ("eight", "8"),
        ("I know not", "No"),
        ("Noah", "No"),
        ("Par is", "Paris"),
        ("aRedb", "Red"),
    ],
)
def test_an_answer_is_not_held(completion, answer):
    assert not holds(completion, answer)


def test_an_answer_with_signs_of_regular_expressions():
    assert holds("so: a+b (c)", "a+b (c)") and not holds("aab c", "a+b (c)")


def test_the_hacked_reward_shows(task):
    """An empty answer has nearly the best reward, and nothing right."""
    empty = task.judge(task.train, ["", ""])
    right = task.judge(task.train, ["3 + 5 = 8", "No, they cannot fly."])
    assert empty.rewards.mean() > right.rewards.mean()
    assert empty.metrics["accuracy"].tolist() == [0, 0] and right.metrics["accuracy"].tolist() == [1, 1]


def test_the_normalised_score_is_the_papers(task):
    made = task.judge(task.train, ["8", "x" * 2002])
    assert made.metrics["normalised"].tolist() == [1, 0]


def test_own_prompts(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "2 + 2 =", "answer": "4"}\n')
    made = making.make(config.TaskSettings(train_data=str(path)))
    assert made.train == [{"prompt": "2 + 2 =", "answer": "4"}] and made.held_out == []
    assert made.score(made.train, ["4."]).tolist() == [-1]


def test_own_prompts_need_the_shortest_answer(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "2 + 2 =", "answer": 4}\n')
    with pytest.raises(InputError, match=r"train.jsonl: line 1: answer: given 4, needed"):
        making.make(config.TaskSettings(train_data=str(path)))
