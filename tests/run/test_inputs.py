"""Files that are not there are told before torch is imported, all of them at once."""

from __future__ import annotations

import pytest
from launching import DATA, problems, python

from mpies.errors import InputError
from mpies.run.inputs import load_settings

pytestmark = pytest.mark.lengthy

MISSING = ["task.train_data=none.jsonl", "task.eval_data=./no/folder", "task.reward=none.py:right"]


def test_missing_files_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_settings(["model.path=./none", *MISSING])
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "model.path",
        "task.train_data",
        "task.eval_data",
        "task.reward",
    ]
    assert lines[0] == "model.path: cannot load ./none: there is no such folder"


@pytest.mark.parametrize("path", ["organisation/model", "gpt2"])
def test_what_may_be_in_the_hubs_cache_is_left_to_loading(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings([f"model.path={path}"]).model.path == path


COMMANDS = {
    "train": ["mpies.train", "model.path=./none"],
    "check": ["mpies.check", "model.path=./none"],
    "probe": ["mpies.probe", "model.path=./none"],
    "evaluate": ["mpies.evaluate", "./none"],
    "evaluate, a run": ["mpies.evaluate", DATA / "schema-2.h5", "model.path=./none"],
    "bench": ["mpies.bench", "--model", "./none"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_path_does_not_wait_for_torch(tmp_path, command):
    ended = python("-X", "importtime", "-m", *COMMANDS[command], cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert problems(ended.stderr)[0] == "model.path: cannot load ./none: there is no such folder"
    assert "| torch" not in ended.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["mpies.check", "mpies.evaluate"])
def test_missing_data_do_not_wait_for_torch(tmp_path, tiny_model, command):
    model = [tiny_model()] if command == "mpies.evaluate" else [f"model.path={tiny_model()}"]
    ended = python("-X", "importtime", "-m", command, *model, *MISSING, cwd=tmp_path)
    assert ended.returncode == 2
    assert [line.split(":")[0] for line in problems(ended.stderr)] == [
        "task.train_data",
        "task.eval_data",
        "task.reward",
    ]
    assert "| torch" not in ended.stderr and not list(tmp_path.iterdir())
