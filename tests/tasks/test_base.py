"""What every task does: rows for a generation, rewards of answers, copies for the reward function."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from mpies.errors import InputError
from mpies.tasks.base import Task, TrainerState, answer_text, check_rewards, member_reward

ROWS = [
    {"prompt": "a", "answers": ["1", "one"], "facts": {"seen": []}, "n": 1},
    {"prompt": "b", "answers": ["2"], "facts": {"seen": []}, "n": 2},
]
CHAT = [{"prompt": [{"role": "user", "content": "a"}], "answers": ["1"]}]


def spoiling(prompts, completions, trainer_state, log_extra, log_metric, **columns):
    """Notes what it gets, then changes all of it in place."""
    seen.append(copy.deepcopy({"prompts": prompts, **columns}))
    columns.pop("completion_ids")
    for prompt in prompts:
        if isinstance(prompt, list):
            prompt[-1]["content"] = "spoiled"
            prompt.append({"role": "user", "content": "more"})
    for answers in columns.get("answers", []):
        answers.append("spoiled")
    for facts in columns.get("facts", []):
        facts["seen"].append(1)
        facts["new"] = True
    for values in [prompts, *columns.values()]:
        values.reverse()
    return [0.0] * len(completions)


seen: list[dict] = []


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("call", ["score", "judge"])
def test_a_reward_function_that_changes_its_columns_changes_nothing_else(rows, call):
    """Else it would have changed them on its rank only, and rewards would depend on the number of ranks."""
    rows, seen[:] = copy.deepcopy(rows), []
    task = Task("test", rows, [], spoiling)
    before, digest = copy.deepcopy(rows), Task("test", rows, [], spoiling).digest
    for _ in range(3):
        getattr(task, call)(rows, ["x"] * len(rows), [[5]] * len(rows))
    assert seen[1] == seen[0] and seen[2] == seen[0]
    assert rows == before and Task("test", rows, [], spoiling).digest == digest


def test_without_a_state_a_function_gets_one_that_counts_from_0():
    states = []

    def reward(completions, trainer_state, **_):
        states.append(trainer_state)
        return [0.0 for _ in completions]

    task = Task("test", ROWS, [], reward)
    task.score(ROWS, ["x", "y"])
    task.judge(ROWS, ["x", "y"], state=TrainerState(4, 9))
    assert states == [TrainerState(0, 0), TrainerState(4, 9)]


def test_columns_that_trl_does_not_pass_on_are_not_passed_on():
    rows = [{"prompt": "a", "completion": "the right one", "completion_ids": [1], "n": 7}]
    got = []

    def reward(completions, **columns):
        got.append(columns)
        return [0.0]

    Task("test", rows, [], reward).score(rows, ["x"], [[3]])
    assert set(got[0]) == {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "n"}
    assert got[0]["completion_ids"] == [[3]] and got[0]["n"] == [7]


@pytest.mark.parametrize(
    "given, expected",
    [
        ([1, 2.5], [1, 2.5]),
        ([None, math.nan], [None, None]),
        ([math.inf, -math.inf], [None, None]),
        (np.array([1, 2]), [1, 2]),
        ((True, "3"), [1, 3]),
        ([1e100, -0.0], [1e100, 0]),
    ],
)
def test_rewards_are_numbers_or_unknown(given, expected):
    made = check_rewards(given, 2, "f")
    assert made.dtype == np.float64
    assert [None if math.isnan(r) else r for r in made] == expected


@pytest.mark.parametrize(
    "given, says",
    [
        ([1.0], "f returned 1 rewards; needed is"),
        ([1.0] * 3, "f returned 3 rewards; needed is"),
        (None, r"f returned None \(NoneType\); needed is"),
        (1.5, r"f returned 1.5 \(float\); needed is"),
        ("12", r"f returned '12' \(str\); needed is"),
        ({0.5: 1, 1.5: 2}, r"f returned \{0.5: 1, 1.5: 2\} \(dict\); needed is"),
        ([1, 1e101], r"f returned 1e\+101 \(float\) for completion 2; needed is .* a number up to 1e\+100"),
        ([10**400, 1], r"f returned 1000+.*0 \(int\) for completion 1; needed is"),
        ([1, "a"], r"f returned 'a' \(str\) for completion 2; needed is"),
        (np.zeros((2, 1)), r"f returned array.* \(ndarray\) for completion 1; needed is"),
        ([[1.0], [2.0]], r"f returned \[1.0\] \(list\) for completion 1; needed is"),
    ],
)
def test_what_is_no_list_of_rewards_is_told(given, says):
    with pytest.raises(InputError, match=says):
        check_rewards(given, 2, "f")


def test_a_members_reward_is_the_mean_of_its_answers():
    assert member_reward(np.array([1.0, 2.0, 6.0])) == 3
    assert member_reward(np.array([1e16, 1.0, -1e16])) == 1 / 3  # summed exactly
    assert math.isnan(member_reward(np.array([1.0, math.nan])))


def test_metrics_of_the_task_stand_beside_what_the_function_logs():
    def reward(completions, log_extra, log_metric, **_):
        log_extra("length", [len(c) for c in completions])
        log_extra("accuracy", [5, 5])
        log_metric("of all", 3)
        log_extra("too few", [1])
        return [1.0, None]

    def metrics(rows, texts):
        return {"accuracy": [text == row["prompt"] for row, text in zip(rows, texts, strict=True)]}

    task = Task("test", ROWS, [], reward, metrics)
    found = task.judge(ROWS, ["xyz", "b"])
    assert found.rewards[0] == 1 and math.isnan(found.rewards[1])
    assert {name: values.tolist() for name, values in found.metrics.items()} == {
        "length": [3, 1],
        "accuracy": [0, 1],
        "of all": [3, 3],
    }


def test_a_generations_rows_are_all_or_those_of_its_turn():
    rows = [{"prompt": str(i)} for i in range(7)]
    assert Task("test", rows, [], spoiling).rows(3) == rows
    some = Task("test", rows, [], spoiling, prompts_per_generation=3, seed=5)
    # Two generations an epoch, in which no prompt comes twice; the next epoch has another order.
    turns = [[row["prompt"] for row in some.rows(generation)] for generation in range(6)]
    for first, second in zip(turns[::2], turns[1::2]):
        assert len({*first, *second}) == 6
    assert len({tuple(turn) for turn in turns}) == 6
    assert turns == [[r["prompt"] for r in some.rows(g)] for g in range(6)]


@pytest.mark.parametrize(
    "train, held_out, per_generation, expected",
    [
        (5, 2, 0, {"train": 5, "held_out": 2}),
        (5, 0, 0, {"train": 5}),
        (5, 2, 1, {"train": 2, "held_out": 2}),  # as many as are held out
        (5, 1, 3, {"train": 3, "held_out": 1}),  # or as a generation uses
        (5, 0, 2, {"train": 2}),
        (2, 9, 1, {"train": 2, "held_out": 9}),
    ],
)
def test_what_evaluations_evaluate(train, held_out, per_generation, expected):
    tables = [[{"prompt": f"{name}{i}"} for i in range(n)] for name, n in (("t", train), ("h", held_out))]
    task = Task("test", *tables, spoiling, prompts_per_generation=per_generation)
    assert {name: len(rows) for name, rows in task.splits.items()} == expected
    assert task.splits["train"] == tables[0][: expected["train"]]
    assert len(list(task.prompts)) == train + held_out


def test_the_digest_is_of_the_rows_their_order_and_their_split():
    a, b = {"prompt": "a", "n": 1}, {"n": 2, "prompt": "b"}
    tables = [([a, b], []), ([b, a], []), ([a], [b]), ([a, {**b, "n": 3}], [])]
    assert len({Task("test", *both, spoiling).digest for both in tables}) == 4
    same = {"n": 1, "prompt": "a"}
    assert Task("test", [same, b], [], None).digest == Task("other", [a, b], [], spoiling).digest


def test_the_text_of_an_answer():
    assert answer_text("x") == "x"
    assert answer_text([{"role": "assistant", "content": "y"}]) == "y"
