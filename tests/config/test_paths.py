"""Paths are absolute from the start, by the folder that the program was started in."""

from __future__ import annotations

import os

import pytest

from mpies import config
from mpies.errors import InputError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*given: str) -> dict:
    return config.make_absolute(config.load(list(given))).flat()


def test_relative_paths_are_of_this_folder(here):
    (here / "model").mkdir()
    found = made(
        "model.path=model",
        "run.directory=runs/../run",
        "run.metrics=metrics/mpies.prom",
        "task.train_data=train.jsonl",
        "task.eval_data=../held-out.jsonl",
        "task.reward={rewards.py:right: 1, sub/more.py:brief: 0.5, package.module:score: 2}",
    )
    assert found["model.path"] == str(here / "model")
    assert found["run.directory"] == str(here / "run")
    assert found["run.metrics"] == str(here / "metrics" / "mpies.prom")
    assert found["task.train_data"] == str(here / "train.jsonl")
    assert found["task.eval_data"] == str(here.parent / "held-out.jsonl")
    assert found["task.reward"] == {
        f"{here}/rewards.py:right": 1,
        f"{here}/sub/more.py:brief": 0.5,
        "package.module:score": 2,
    }


@pytest.mark.parametrize("path", ["quickstart", "Qwen/Qwen2.5-3B-Instruct"])
def test_what_is_no_folder_is_a_hub_id(here, path):
    assert made(f"model.path={path}")["model.path"] == path


def test_what_is_empty_or_absolute_stays(here):
    found = made("run.directory=/somewhere/run", "model.path=/somewhere/model")
    assert (found["run.directory"], found["model.path"]) == ("/somewhere/run", "/somewhere/model")
    assert found["task.train_data"] == found["task.eval_data"] == ""


def test_home_is_known(here, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = ["task.reward=~/rewards.py:right", "task.train_data=~/train.jsonl"]
    found = made(*given)
    assert found["task.reward"] == {"/home/somebody/rewards.py:right": 1}
    assert found["task.train_data"] == "/home/somebody/train.jsonl"


def test_settings_that_are_absolute_stay_when_they_are_read_elsewhere(here, tmp_path_factory):
    settings = config.make_absolute(config.load(["task.reward=a.py:b", "task.train_data=c.jsonl"]))
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert config.make_absolute(config.from_yaml(settings.to_yaml())) == settings
    assert config.relative_paths(settings) == {}


def test_relative_paths_of_earlier_versions_are_found():
    given = ["task.reward={b.py:f: 1, /a.py:g: 1, m.n:h: 1}", "task.train_data=c.jsonl"]
    assert config.relative_paths(config.load(given)) == {
        "task.reward": "b.py:f",
        "task.train_data": "c.jsonl",
    }


@pytest.mark.parametrize(
    "reward, short",
    [("/a/b.py:f", "b.py:f"), ("b.py:f", "b.py:f"), ("package.module:f", "package.module:f")],
)
def test_a_reward_without_its_folder(reward, short):
    assert config.short_name(reward) == short


@pytest.mark.parametrize(
    "given",
    [
        ["task.reward=[a/score.py:score, b/score.py:score]"],
        ["task.reward=a/x.py:f", "task.tools=b/x.py:f"],
        ["task.environment_factory={one: a/x.py:F, two: b/x.py:F}"],
    ],
)
def test_code_that_only_its_folder_tells_apart_is_refused(given):
    data = "task.train_data=rows.jsonl"
    with pytest.raises(
        InputError, match=r"^task: .*a/.* and .*b/.* are both called \w+\.py:\w+; give one file"
    ):
        config.load(["task.name=custom", data, *given])
    config.load(["task.name=custom", data, *(text.replace("b/", "a/") for text in given)])
