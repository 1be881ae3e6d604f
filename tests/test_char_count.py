"""The example char_count: the same rows everywhere, its reward, and a start that goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import launching
import numpy as np
import pytest
from safetensors.torch import load_file

from mpies import config
from mpies.tasks import making, users_code

EXAMPLE = Path(__file__).parents[1] / "examples" / "char_count"
DIGESTS = {
    "train": "e64b48052f6f080d3360d6aca369a5f971421d32856e71f297ba21aff9710446",
    "held-out": "1d1beaf3e00320ad134102a5cd5963f742eafbaaeafb0bb7d339acc1bffde425",
}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's folder with its data, made by its script."""
    folder = shutil.copytree(
        EXAMPLE, tmp_path_factory.mktemp("examples") / "char_count", ignore=shutil.ignore_patterns("*.jsonl")
    )
    ended = launching.python(folder / "data.py")
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_same_rows_everywhere(example):
    made = {name: (example / f"{name}.jsonl").read_bytes() for name in DIGESTS}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in made.items()} == DIGESTS
    rows = {name: [json.loads(line) for line in content.splitlines()] for name, content in made.items()}
    assert {name: len(each) for name, each in rows.items()} == {"train": 9000, "held-out": 1000}
    questions = [row["prompt"][0]["content"] for each in rows.values() for row in each]
    assert len(set(questions)) == 10_000
    for row in rows["held-out"]:
        letter, word = row["prompt"][0]["content"].removeprefix("How many ").split(" are there in word ")
        assert row["answer"] == word.count(letter) >= 1 and 5 <= word.count("-") + 1 <= 20


def test_worked_answers_are_right_and_others_are_not(example):
    words = [
        f"task.{key}={example / name}.jsonl"
        for key, name in (("train_data", "train"), ("eval_data", "held-out"))
    ]
    words += [f"task.reward={example / 'rewards.py'}:right"]
    settings = config.load([str(example / "char_count.yaml"), *words])
    task = making.make(settings.task, settings.es.seed)
    assert len(task.rows(1)) == settings.task.prompts_per_generation
    rows = task.held_out[:200]
    assert task.score(rows, [row["solution"] for row in rows]).tolist() == [1] * 200
    assert not task.score(rows, [row["solution"].replace("boxed{", "boxed{1") for row in rows]).any()
    assert not task.score(rows, [str(row["answer"]) for row in rows]).any(), "an answer belongs in a box"


def test_what_the_last_box_should_have_held(example):
    place = str(example / "rewards.py")
    right_box, likely = (users_code.load(f"{place}:{name}", "test") for name in ("right_box", "likely"))
    texts = ["a = a\n\\boxed{3}", "\\boxed{1} or \\boxed{2", "a != b"]
    given = {
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "answer": [1, 12, 4],
    }
    assert right_box(**given) == [
        ("a = a\n\\boxed{", "1}"),
        ("\\boxed{1} or \\boxed{", "12}"),
        ("a != b\n\\boxed{", "4}"),
    ]
    logged = {}
    found = likely(
        **given,
        log_probabilities=np.log([[0.5, 0.5], [1, 1], [0.1, 1]]),
        log_extra=lambda name, values: logged.update({name: values}),
    )
    assert found == pytest.approx([0.25, 1, 0.1])
    assert logged["accuracy"] == [0, 0, 0] and logged["format"] == [1, 1, 0]


def test_what_follows_the_worked_answer(example):
    place = str(example / "rewards.py")
    worked, known = (users_code.load(f"{place}:{name}", "test") for name in ("worked", "known"))
    rows = [json.loads(line) for line in (example / "train.jsonl").read_text().splitlines()[:50]]
    columns = {name: [row[name] for row in rows] for name in ("answer", "solution")}
    pairs = worked(completions=[[{"role": "assistant", "content": "?"}]] * 50, **columns)
    assert [kept + expected for kept, expected in pairs] == columns["solution"]
    assert [expected for _, expected in pairs] == [f"{count}}}" for count in columns["answer"]]
    found = known(log_probabilities=[np.log([0.5, 0.5]), None], **{k: v[:2] for k, v in columns.items()})
    assert found == pytest.approx([0.25, 0])


@pytest.mark.long
@pytest.mark.slow
def test_the_start_goes_on_where_it_was(example, tiny_model):
    """Cut off after ten steps, it ends with the weights of one that was not."""

    def tune(name: str, steps: str, *code: str):
        start = ["-c", *code] if code else [example / "sft.py"]
        ended = launching.python(*start, tiny_model(), example / name, "--steps", steps, "--batch", "4")
        assert ended.returncode == (1 if code else 0), ended.stderr
        return ended.stdout

    cut = (
        f"import sys, runpy, torch; sys.argv[0] = {str(example / 'sft.py')!r}; save = torch.save\n"
        "def stop(*given): save(*given); sys.exit(1)\n"
        "torch.save = stop; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    whole, before = tune("whole", "12"), tune("cut", "12", cut)
    after = tune("cut", "12")
    assert whole.splitlines() == before.splitlines() + after.splitlines()
    first, second = (load_file(example / name / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)
