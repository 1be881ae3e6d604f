"""Countdown: the reward to the letter, made-up problems, files; and answers that would hang `eval`."""

from __future__ import annotations

import json
from fractions import Fraction

import fuzz_countdown
import pytest

from mpies import config
from mpies.errors import InputError
from mpies.tasks import countdown, making
from mpies.tasks.arithmetic import value_using
from mpies.tasks.countdown import answer_score, format_score, last_answer, reward


def block(expression: str) -> str:
    return f"<answer>{expression}</answer>"


# The answer's part


@pytest.mark.parametrize(
    "expression, value",
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("1 - 2 - 3", -4),
        ("3/2/1", Fraction(3, 2)),
        ("1/3+2", Fraction(7, 3)),
        ("-1 + 2 * 3", 5),
        ("1 * -(2 - 3)", 1),
        ("- - 1 + + 2 - + 3", 0),
        ("1 - -2*3", 7),
        ("((((1))))+(2)+3", 6),
        ("  3  *  2  /  1  ", 6),
        ("-1*-2*-3", -6),
    ],
)
def test_values(expression, value):
    assert value_using(expression, [1, 2, 3]) == value


@pytest.mark.parametrize(
    "expression",
    [
        "1+2",  # a number is missing
        "1+2+3+3",  # one is used twice
        "1+23",
        "1 2+3",
        "1+2+03",
        "1**2**3",  # no operation of the game, though Python's
        "1//2+3",
        "1/(2-2)+3",
        "3/(1+1-2)",
        "1+2+3=6",
        "1+2+3\n",
        "1+2+3.0",
        "1e2+3",
        "1+2(3)",
        "(1)(2)(3)",
        "(1+2+3",
        "1+2+3)",
        ")1+2+3(",
        "()1+2+3",
        "1+2+3()",
        "1+2+3+",
        "*1+2+3",
        "+",
        "",
        " ",
        "1+2+x",
        "1+2+3#",
        "１+２+３",  # digits, but of another script
        "1+2+²3",
        "1+2×3",
        "__import__('os')",
    ],
)
def test_what_has_no_value(expression):
    assert value_using(expression, [1, 2, 3]) is None


def test_division_by_zero_has_no_value():
    assert value_using("3/(2-2)", [2, 2, 3]) is None


def test_every_number_as_often_as_given():
    assert value_using("7*7", [7, 7]) == 49
    assert value_using("7*7", [7]) is None
    assert value_using("7", [7, 7]) is None


@pytest.mark.parametrize(
    "completion, target, expected",
    [
        (block("(44-19)+35"), "60", 1),
        ("so</think>\n" + block(" 44 - 19 + 35 "), "60", 1),
        (block("44-19+35"), "61", 0),
        (block("1") + block("44-19+35"), "60", 1),  # the last block counts
        (block("44-19+35") + block("1"), "60", 0),
        (block("44-19+35") + "<answer>1", "60", 1),  # which ends
        ("<answer>" + block("44-19+35"), "60", 0),  # a block begins where the first one does
        ("44-19+35", "60", 0),
        ("<answer>44-19+35", "60", 0),
        ("44-19+35</answer>", "60", 0),
        ("</answer>44-19+35<answer>", "60", 0),
        ("<ANSWER>44-19+35</ANSWER>", "60", 0),
        (block(""), "60", 0),
        (block("44/19+35"), "37.3157", 0),
        (block("44/19+35"), "37.31578", 1),  # within 1e-5
        (block("44/19+35"), "37.315789473684", 1),
        (block("44/19+35"), "37.3158", 0),
        (block("44/19+35"), "37.31580", 0),
        (block("19-44-35"), "-60", 1),
        (block("\n(44 - 19) + 35\n"), "60", 1),  # any white space at the block's ends
        (block(" \t\r\n44-19+35\u00a0\x0b\n\n"), "60", 1),
        (block("44 -\n19 + 35"), "60", 0),  # but only spaces within
        (block("44 -\t19 + 35"), "60", 0),
        (block("\n \n"), "60", 0),
        (block("44-19+35"), "60.00001", 0),  # less than 1e-5 away
        (block("44-19+35"), "60.000009", 1),
    ],
)
def test_answer(completion, target, expected):
    assert answer_score(completion, [44, 19, 35], target) == expected


# The format's part


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("so</think>\n<answer>1</answer>", 1),
        ("</think>\n<answer></answer>", 1),
        ("a</think> b</think>\n<answer>1</answer> <answer>2</answer>", 1),
        ("so</think>\n\n<answer>1</answer>", 0.6),
        ("so</think><answer>1</answer>", 0.6),
        ("so</think>\n<answer>1</answer>\n", 1),
        ("so</think>\n<answer>\n1\n</answer>\n", 1),
        ("so</think>\n<answer>1</answer>\n\n", 0.6),
        ("so</think>\n<answer>1</answer>\r\n", 0.6),
        ("so</think>\n<answer>1</answer> ", 0.6),
        ("so</think>\n<answer>1</answer>.", 0.6),
        ("so</think>", 0.1),
        ("so<answer>1</answer>", 0.5),
        ("<answer>1</answer></think>", 0.6),
        ("so</think>\n<answer>", 0.1),
        ("so</think>\n</answer><answer>", 0.1),
        ("so</think>\n<answer>1</answer", 0.1),
        ("so</think>\n<answer</answer>", 0.1),
        ("", 0),
        ("</answer></answer>", 0),
    ],
)
def test_format(completion, expected):
    assert format_score(completion) == pytest.approx(expected, abs=1e-15)


def test_reward_is_answer_plus_a_tenth_of_the_format():
    good = "so</think>\n<answer>44-19+35</answer>"
    completions = [good, good.replace("\n", ""), good.replace("-", "+"), "no idea"]
    made = reward(["p"] * 4, completions, [[44, 19, 35]] * 4, ["60"] * 4, id=[0, 1, 2, 3])
    assert made == pytest.approx([1.1, 1.06, 0.1, 0])


def test_reward_of_chat_messages_is_that_of_their_text():
    message = [{"role": "assistant", "content": block("2*3")}]
    assert reward([[]], [message], [[2, 3]], ["6"]) == reward([""], [block("2*3")], [[2, 3]], ["6"])


@pytest.mark.parametrize("text", ["<answer>a</answer>b<answer>c</answer>", "<answer><answer>c</answer>"])
def test_last_answer_ends_the_text(text):
    assert last_answer(text).endswith("c")


# Made-up problems


def test_made_up_problems_are_solvable_and_different():
    task = making.make(config.TaskSettings(name="countdown"))
    assert (len(task.train), len(task.held_out)) == (200, 2000)
    rows = task.train + task.held_out
    scores = task.judge(rows, [f"</think>\n{block(row['solution'])}" for row in rows])
    assert scores.metrics["accuracy"].min() == 1 and scores.rewards.min() == pytest.approx(1.1)
    assert len({(*sorted(row["numbers"]), row["target"]) for row in rows}) == len(rows)
    assert {len(row["numbers"]) for row in rows} == {3, 4}
    assert all(1 <= n <= 99 for row in rows for n in row["numbers"])
    assert all(1 <= int(row["target"]) <= 999 for row in rows)


def test_no_two_problems_are_alike(monkeypatch):
    """With few numbers to choose from, the same ones would come soon."""
    monkeypatch.setattr(countdown, "LARGEST_NUMBER", 3)
    rows = making.make(config.TaskSettings(name="countdown", train_size=15, eval_size=15)).train
    assert len({(*sorted(row["numbers"]), row["target"]) for row in rows}) == 15


def test_all_four_operations_are_needed():
    rows = making.make(config.TaskSettings(name="countdown")).held_out
    share = {op: sum(op in row["solution"] for row in rows) / len(rows) for op in "+-*/"}
    assert min(share.values()) > 0.02 and max(share.values()) < 0.9


def test_made_up_problems_follow_from_the_seed():
    one, same, other = (
        making.make(config.TaskSettings(name="countdown", eval_size=20, seed=seed)) for seed in (42, 42, 43)
    )
    assert one.train == same.train and one.held_out == same.held_out
    assert one.train != other.train
    # Pinned: a run that is resumed with another version has to have the same prompts.
    assert (one.held_out[0]["numbers"], one.held_out[0]["target"]) == ([58, 91, 30], "119")


def test_held_out_problems_do_not_depend_on_the_number_of_training_problems():
    few, many = (
        making.make(config.TaskSettings(name="countdown", train_size=n, eval_size=50)) for n in (10, 300)
    )
    assert few.held_out == many.held_out and many.train[:10] == few.train


def test_how_many_numbers():
    task = making.make(config.TaskSettings(name="countdown", numbers=[3], eval_size=30))
    assert {len(row["numbers"]) for row in task.train + task.held_out} == {3}


def test_prompt_is_raw_text_that_ends_in_a_think_block():
    settings = config.TaskSettings(name="countdown", eval_size=1)
    (row,) = making.make(settings).held_out
    assert not settings.chat_template
    assert f"[{' '.join(map(str, row['numbers']))}]" in row["prompt"] and row["target"] in row["prompt"]
    assert row["prompt"].endswith("Let me solve this step by step.\n<think>")


# Files in the paper's format

ROW = {"id": 7, "context": "Use [1 2 3].\n<think>", "numbers": [1, 2, 3], "target": "6", "solution": "1+2+3"}


def from_file(path, rows, **settings):
    path.write_text(json.dumps(rows))
    return making.make(config.TaskSettings(name="countdown", train_data=str(path), **settings))


def test_rows_of_a_file(tmp_path):
    task = from_file(tmp_path / "data.json", [ROW, ROW | {"id": 8, "target": "2.5"}])
    assert task.train[0] == {
        "prompt": "Use [1 2 3].\n<think>",
        "numbers": [1, 2, 3],
        "target": "6",
        "id": 7,
        "solution": "1+2+3",
    }
    assert task.score(task.train, [block("1+2+3")] * 2).tolist() == pytest.approx([1.05, 0.05])
    assert task.held_out == []


def test_the_file_of_the_paper_holds_training_and_test_samples(tmp_path):
    rows = [ROW | {"id": i} for i in range(10)]
    task = from_file(tmp_path / "data.json", rows, train_size=3, eval_size=4)
    assert [row["id"] for row in task.train] == [0, 1, 2]
    assert [row["id"] for row in task.held_out] == [3, 4, 5, 6]


def test_without_a_context_the_prompt_is_ours(tmp_path):
    task = from_file(tmp_path / "data.json", [{"numbers": [4, 5], "target": 20}])
    assert task.train[0]["prompt"] == countdown.prompt_of([4, 5], "20")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"numbers": None}, "numbers: given None, needed is a list"),
        ({"numbers": []}, "numbers: given []"),
        ({"numbers": ["1"]}, "numbers: given ['1']"),
        ({"numbers": [1.5]}, "numbers: given [1.5]"),
        ({"numbers": [True]}, "numbers: given [True]"),
        ({"numbers": [0]}, "numbers: given [0]"),
        ({"target": None}, "target: given None, needed is a number"),
        ({"target": "1e999999999"}, "target: given '1e999999999'"),
        ({"target": "six"}, "target: given 'six'"),
        ({"context": 5}, "context: given 5, needed is text"),
    ],
)
def test_rows_that_are_wrong(tmp_path, change, words):
    with pytest.raises(InputError) as error:
        from_file(tmp_path / "data.json", [ROW, ROW | change])
    (line,) = str(error.value).splitlines()
    assert line.startswith("task.train_data: ") and "data.json: line 1: " in line and words in line


# Hostile answers


def test_hostile_answers_are_scored_in_no_time():
    """A million of them: python tests/helpers/fuzz_countdown.py"""
    compared, slowest = fuzz_countdown.run(answers=10_000, seed=1)
    assert compared > 3000
    assert max(slowest.values()) < 3, slowest
