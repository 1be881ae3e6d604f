"""The task of short questions: its rows, its reward, and what of it the quickstart takes."""

from __future__ import annotations

import json

import pytest

from mpies import config
from mpies.errors import InputError
from mpies.tasks import making
from mpies.tasks.questions import metrics, reward

SETTINGS = config.TaskSettings(name="questions")


def test_own_questions():
    task = making.make(SETTINGS)
    assert (len(task.train), len(task.held_out)) == (100, 100)
    prompts = [row["prompt"] for row in task.train + task.held_out]
    assert len(set(prompts)) == 200 and all(prompt.endswith("?") for prompt in prompts)


def test_every_bare_answer_is_worth_most():
    task = making.make(SETTINGS)
    for row in task.train + task.held_out:
        shortest = min(row["answer"], key=len)
        assert reward([row["prompt"]], [shortest], answer=[row["answer"]]) == [1.0]
        assert all(made > 0.8 for made in reward(None, row["answer"], [row["answer"]] * len(row["answer"])))


@pytest.mark.parametrize(
    "completion, known, expected",
    [
        ("Rome", ["Rome"], 1),
        ("rome.", ["Rome"], 1 / 1.01),
        (" Rome\n", ["Rome"], 1),  # white space around an answer costs nothing
        ("The capital of Italy is Rome.", ["Rome"], 1 / 1.25),
        ("Rome" + " " * 50 + "!" * 50, ["Rome"], 1 / 2),
        ("Romeo", ["Rome"], 0),
        ("Paris", ["Rome"], 0),
        ("", ["Rome"], 0),
        ("24", ["four", "4"], 0),
        ("four", ["four", "4"], 1 / 1.03),
        ("new york", ["New York"], 1),
    ],
)
def test_reward_by_hand(completion, known, expected):
    (made,) = reward(None, [completion], answer=[known])
    assert made == pytest.approx(expected, abs=1e-12) and isinstance(made, float)
    rows = [{"prompt": "", "answer": known}]
    assert metrics(rows, [completion]) == {
        "accuracy": [float(expected > 0)],
        "characters": [len(completion.strip())],
    }


def test_chats_are_scored_alike():
    chat = [{"role": "assistant", "content": "The capital of Italy is Rome."}]
    assert reward(None, [chat], answer=[["Rome"]]) == [0.8]


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2 + 2?", "answer": "4"}\n{"prompt": "1 + 1?", "answer": ["2", "two"]}\n')
    task = making.make(config.TaskSettings(name="questions", train_data=str(path)))
    assert [row["answer"] for row in task.train] == [["4"], ["2", "two"]] and not task.held_out


@pytest.mark.parametrize("answer", [None, "", " ", [], ["Rome", ""], 4, [4], {"text": "Rome"}])
def test_rows_without_an_answer_are_refused(tmp_path, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "What is it?", "answer": answer}) + "\n")
    with pytest.raises(
        InputError, match=r"line 1: answer: given .*, needed is a right answer, or a list"
    ) as info:
        making.make(config.TaskSettings(name="questions", train_data=str(path)))
    assert "\n" not in str(info.value)


def test_the_quickstart_takes_a_part_of_them_in_every_generation():
    settings = config.load([])
    task = making.make(settings.task, settings.es.seed)
    drawn = [tuple(row["prompt"] for row in task.rows(generation)) for generation in range(1, 5)]
    assert {len(set(prompts)) for prompts in drawn} == {8} and len(set(drawn)) == 4


@pytest.mark.parametrize(
    "words, name",
    [
        (["task.name=conciseness"], "conciseness"),
        (["task.train_data=rows.jsonl", "task.reward=rewards.py:right"], "custom"),
        (["task.train_data=rows.jsonl"], "conciseness"),
    ],
)
def test_the_quickstarts_task_gives_way_as_a_whole_to_ones_own(words, name):
    given = config.load(words).task
    assert (given.name, given.prompts_per_generation) == (name, 0)
    assert config.load(["task.eval_size=10"]).task.name == "questions"
