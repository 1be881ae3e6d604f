"""Odd inputs, over all commands: one line that names what is wrong, code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import launching
import numpy as np
import pytest
import small

from mpies import replay, train
from mpies.analyze import commands as analyze
from mpies.bench import __main__ as bench
from mpies.check import __main__ as check
from mpies.errors import InputError
from mpies.evaluate import command as evaluate

REFERENCE = launching.DATA / "schema-2.h5"
LONG = "x" * 5000


@pytest.fixture
def runs(alone, tiny_model, tmp_path):
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        yield runs


@pytest.fixture
def refused(alone, tmp_path, monkeypatch, capfd):
    """refused(command, arguments) -> the line with which it ends, having left everything as it was."""
    monkeypatch.chdir(tmp_path)
    alone_commands = {"replay": replay.main, "analyze": analyze.main}
    others = {"train": train.main, "check": check.main, "evaluate": evaluate.main, "bench": bench.main}

    def call(command: str, *arguments: object) -> str:
        given, before = [str(argument) for argument in arguments], sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        try:
            if command in alone_commands:
                status = alone_commands[command](given)
            else:
                status = others[command](alone, given)
            lines = launching.problems(capfd.readouterr().err)
        except InputError as error:
            status, lines = error.status, str(error).splitlines()
        assert status == 2
        assert sorted(tmp_path.rglob("*")) == before, "something is left behind"
        (line,) = lines
        assert len(line) < 700
        return line

    return call


# Data

MATH = {"task__name": "math", "task__reward": "{}"}
DATA = {
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), {}, "not UTF-8 text (byte 0)"),
    "gzip": (b"\x1f\x8b\x08\x00", {}, "not UTF-8 text (byte 1)"),
    "nan": (b'{"prompt": NaN}', {}, "line 1: prompt: given nan"),
    "digits": (b'{"prompt": 1' + b"0" * 5000 + b"}", {}, "line 1 is not JSON"),
    "deep": (
        b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        {},
        "line 1: brackets within brackets, deeper than 50",
    ),
    "no tokens": (
        b'{"prompt": [{"role": "user", "content": ""}]}',
        {"model__path": "bare"},
        "training prompt 1 has no tokens",
    ),
    "gold that is no number": (
        b'{"problem": "a", "answer": NaN}',
        MATH,
        "line 1: answer: given nan, needed is",
    ),
    "gold without bound": (
        b'{"problem": "a", "answer": 1e999}',
        MATH,
        "line 1: answer: given inf, needed is",
    ),
    "numbers without bound": (
        json.dumps({"numbers": [10**4000, 1], "target": "5"}).encode(),
        {"task__name": "countdown", "task__reward": "{}"},
        "training prompt 1 has 4334 tokens",
    ),
    "pipe": (None, {}, "this is a pipe or a device"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data(runs, refused, tmp_path, kind):
    content, changes, words = DATA[kind]
    if changes.get("task__name") == "math":
        pytest.importorskip("math_verify")
    path = tmp_path / "odd.jsonl"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    if changes.get("model__path") == "bare":  # its template writes what the messages say, and nothing else
        shutil.copytree(runs.model, tmp_path / "bare")
        (tmp_path / "bare" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    line = refused("train", *runs.arguments(1, task__train_data=path, task__eval_data="", **changes))
    assert line.startswith("task.train_data: ") and words in line


# Models


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


MODELS = {
    "garbage": ("config.json", "{", "is not a valid JSON file"),
    "list": ("config.json", "[]", "Should have a `model_type` key"),
    "no kind": ("config.json", "{}", "Should have a `model_type` key"),
    "layers": ("config.json", edited(num_hidden_layers=-1), "hf cannot compute LlamaForCausalLM"),
    "vocabulary": ("config.json", edited(vocab_size=50), "lacks 1 weights that fit its config.json"),
    "positions": (
        "config.json",
        edited(max_position_embeddings="many"),
        "Validation error for field 'max_position_embeddings': TypeError",
    ),
    "code": (
        "config.json",
        edited(model_type="mine", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}),
        "contains custom code",
    ),
    "tokenizer": ("tokenizer.json", "{", "cannot load the tokenizer of"),
    "tokenizer's settings": ("tokenizer_config.json", "[]", "cannot load the tokenizer of"),
    "stop tokens": ("generation_config.json", "{", "cannot load the generation_config.json of"),
    "no weights": ("model.safetensors", "", "damaged safetensors file"),
    "header": ("model.safetensors", "\x7f" * 16, "damaged safetensors file"),
    "template without end": (
        "chat_template.jinja",
        "{% for i in range(10**9) %}x{% endfor %}",
        "template cannot write the prompt",
    ),
    "template that looks around": (
        "chat_template.jinja",
        "{{ ''.__class__.__mro__ }}",
        "template cannot write the prompt",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models(runs, refused, tmp_path, kind):
    name, change, words = MODELS[kind]
    model = Path(shutil.copytree(runs.model, tmp_path / "model"))
    change(model / name) if callable(change) else (model / name).write_text(change)
    assert words in refused("train", *runs.arguments(1, model__path=model))


# Settings


@pytest.mark.parametrize(
    "key, value",
    [
        ("es.sigma", "1e300"),
        ("es.sigma", "1e-400"),
        ("es.alpha", "1e300"),
        ("run.threads", 10**9),
        ("run.time_limit", "9" * 400),
        ("run.kl_samples", 10**12),
        ("task.train_size", 10**30),
        ("task.eval_size", -1),
        ("task.seed", 10**30),
        ("run.directory", "\0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_settings(runs, refused, command, key, value):
    line = refused(command, *runs.arguments(1, **{key.replace(".", "__"): value}))
    assert line.startswith(f"{key}: given ")


def test_settings_that_only_the_model_or_the_disk_refuses(runs, refused):
    line = refused("train", *runs.arguments(1, engine__max_new_tokens=10**18))
    assert line.startswith("task.train_data: train") and "the model knows 512 positions" in line
    line = refused("train", *runs.arguments(1, run__directory=LONG))
    assert line.startswith("run.directory: ") and line.endswith("cannot be (File name too long)")


# The run's folder


@pytest.mark.parametrize(
    "kind", ["file", "folder in place of run.h5", "empty run.h5", "folder in place of the lock"]
)
def test_run_directories(runs, refused, kind):
    if kind == "file":
        runs.folder.write_text("")
    elif kind == "empty run.h5":
        runs.folder.mkdir()
        (runs.folder / "run.h5").write_text("")
    else:
        (runs.folder / ("run.lock" if "lock" in kind else "run.h5")).mkdir(parents=True)
    assert str(runs.folder) in refused("train", *runs.arguments(1))


# Run files

FILES = {
    "fitness": lambda f: f.attrs.__setitem__("fitness", "__import__"),
    "dtype": lambda f: f.attrs.__setitem__("dtype", "manual_seed"),
    "dtype, array": lambda f: f.attrs.__setitem__("dtype", np.arange(3)),
    "schema": lambda f: f.attrs.__setitem__("schema_version", "two"),
    "committed": lambda f: f.attrs.__setitem__("generations_committed", float("nan")),
    "no settings": lambda f: f.__delitem__("config"),
    "link to itself": lambda f: (f.__delitem__("member"), f.__setitem__("member", h5py.SoftLink("/member"))),
    "link to elsewhere": lambda f: (
        f.__delitem__("generation/digest"),
        f.__setitem__("generation/digest", h5py.ExternalLink("/etc/passwd", "x")),
    ),
}
# Of a summary, they decide nothing.
COMPUTING = ("fitness", "dtype", "dtype, array")


@pytest.mark.parametrize(
    "command, kind",
    [
        (c, k)
        for c in ("evaluate", "replay", "analyze")
        for k in FILES
        if c != "analyze" or k not in COMPUTING
    ],
)
def test_run_files(refused, tmp_path, command, kind):
    path = tmp_path / "run.h5"
    shutil.copy(REFERENCE, path)
    with h5py.File(path, "r+") as file:
        FILES[kind](file)
    arguments = {
        "evaluate": [path, "run.progress=lines"],
        "replay": [path, "--verify"],
        "analyze": ["summary", path],
    }
    assert refused(command, *arguments[command]).startswith(f"{path}: ")


# Command lines


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        ("evaluate", [LONG, "es.seed=1"], "cannot be (File name too long)"),
        ("evaluate", ["a\0b", "es.seed=1"], "model.path: given 'a\\x00b', allowed is text"),
        (
            "evaluate",
            [REFERENCE, "es.seed=1"],
            "es.seed=1: what has made the run's weights cannot be changed",
        ),
        (
            "evaluate",
            [REFERENCE, "run.threads=1", "--samples", 10**18],
            "--samples: given 1000000000000000000",
        ),
        ("evaluate", [REFERENCE, "run.threads=1", "--generation", "9" * 5000], "--generation: given 9999"),
        ("evaluate", [REFERENCE, "run.threads=1", "--temperature", "nan"], "--temperature: given nan"),
        ("evaluate", [REFERENCE, "run.threads=1", "--json", "/"], "--json: cannot write /"),
        ("replay", [LONG, "--verify"], "not a readable HDF5 file"),
        ("replay", ["a\0b", "--verify"], "there is no such file"),
        ("replay", ["/dev/zero", "--verify"], "/dev/zero: not a readable HDF5 file"),
        ("replay", [REFERENCE.parent, "--verify"], "a folder, not a run file"),
        ("replay", [REFERENCE, "--verify", "--threads", 10**9], "--threads: given 1000000000"),
        ("replay", [REFERENCE, "--generation", "-5"], "--generation: given -5"),
        ("replay", [REFERENCE, "--generation", "1", "--output", f"{REFERENCE}/x"], "is a file"),
        ("analyze", ["summary", LONG], "cannot be (File name too long)"),
        ("analyze", ["summary", "/dev/zero"], "/dev/zero: not a readable HDF5 file"),
        ("analyze", ["samples", REFERENCE, "--prompt", "9" * 5000], "--prompt: no prompt contains"),
        ("analyze", ["samples", REFERENCE, "--prompt", "²"], "--prompt: no prompt contains"),
        ("analyze", ["watch", REFERENCE, "--interval", "nan"], "--interval: given nan"),
        ("analyze", ["compare", REFERENCE, "--generation", "-3"], "--generation: given -3"),
        ("bench", ["--repeats", 0], "--repeats: given 0, allowed is 1 to"),
        ("bench", ["--threads", 0], "--threads: given 0, allowed is 1 to"),
        ("bench", ["--threads", 10**9], "--threads: given 1000000000, allowed is 1 to"),
        ("bench", ["--members", 0], "--members: given 0, allowed is 1 to"),
        ("bench", ["--size", 0], "--size: given 0, allowed is 1 to"),
        ("bench", ["--json", "/"], "--json: cannot write /"),
    ],
    ids=lambda value: str(value)[-30:] if isinstance(value, str) else None,
)
def test_command_lines(refused, command, arguments, words):
    assert words in refused(command, *arguments)


def test_a_pipe_or_a_device_is_written_to_and_not_replaced_by_a_file(runs, alone, tmp_path):
    """The superuser could replace /dev/null."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    given = [runs.model, "task.reward=small:reward", f"task.train_data={tmp_path / 'train.jsonl'}"]
    given += ["engine.max_new_tokens=4", "model.device=cpu", "--json", pipe]
    assert evaluate.main(alone, [str(argument) for argument in given]) == 0
    assert pipe.is_fifo()
    reader.join(20)
    assert len(json.loads(read[0])["splits"]["train"]["answers"]) == len(small.TRAIN)
