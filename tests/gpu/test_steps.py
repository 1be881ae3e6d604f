"""The test on a GPU, tested without one: what becomes of its steps, and what is reported of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import launching
import pytest
import torch
from apart import NEEDS_TRITON
from safetensors import safe_open

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import parts
import report
import shapes
import steps
from steps import Bench, Figure, LeftOutError, Step, WrongError


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path, time.monotonic() + 100)


def refuse(bench: Bench):
    raise LeftOutError("there is one GPU")


def break_off(bench: Bench):
    yield Figure("before", 1.0, "s")
    raise ZeroDivisionError("by zero")


MADE = {
    "good": (
        lambda bench: [Figure("speed", 2.5, "GB/s"), Figure("target", 1, "", ">= 2: missed")],
        "right",
        "",
    ),
    "bad": (
        lambda bench: [Figure("bits", 7, "", "wrong"), Figure("others", 7, "", "right")],
        "wrong",
        "bits",
    ),
    "absent": (refuse, "left out", "there is one GPU"),
    "broken": (break_off, "wrong", "ZeroDivisionError: by zero"),
    "failing": (
        lambda bench: bench.run("-c", "raise SystemExit('no such GPU')"),
        "wrong",
        "exit code 1: no such GPU",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_becomes_of_a_step(bench, name):
    call, state, why = MADE[name]
    outcome = steps.do(Step(name, "it", call, 1), "bits", bench)
    assert (outcome.state, outcome.why) == (state, why)
    assert len(outcome.figures) == {"good": 2, "bad": 2, "broken": 1}.get(name, 0)
    assert outcome.commands == (["python -c raise SystemExit('no such GPU')"] if name == "failing" else [])


def test_time_is_kept(bench):
    bench.deadline = time.monotonic() + 20
    outcome = steps.do(Step("long", "it", lambda bench: [], 21), "bits", bench)
    assert outcome.state == "left out" and "it takes 21" in outcome.why
    bench.deadline = time.monotonic() + steps.END + 1
    with pytest.raises(WrongError, match="not done after 1 s: python -c"):
        bench.run("-c", "import time; time.sleep(30)")


def test_a_pretended_gpu_lacks_something(bench):
    bench.pretended = True
    outcome = steps.do(Step("it", "it", lambda bench: [], 10**6, "why not"), "bits", bench)
    assert (outcome.state, outcome.why) == ("left out", "why not")
    assert steps.do(Step("it", "it", lambda bench: [], 10**6), "bits", bench).state == "right"


def test_reports_add_up(bench, tmp_path):
    """Parts may be done one by one, and again."""
    known = report.facts(pretended=True)
    outcomes = [
        steps.do(Step(name, f"the {name}", call, 1), "bits", bench) for name, (call, *_) in MADE.items()
    ]
    report.write(tmp_path, known, outcomes[:2])
    mended = steps.do(Step("bad", "the bad", lambda bench: [Figure("bits", 8)], 1), "bits", bench)
    report.write(tmp_path, known, [*outcomes[2:], mended])
    written = json.loads((tmp_path / "report.json").read_text())
    states = {step["step"]: step["state"] for step in written["steps"]}
    assert states == {name: state for name, (_, state, _) in MADE.items()} | {"bad": "right"}
    assert written["facts"]["versions"]["torch"] == torch.__version__
    text = (tmp_path / "report.md").read_text()
    assert "| the absent | **left out**: there is one GPU | 0 |" in text
    assert "| speed | 2.5 | GB/s |  |" in text and "python -c raise SystemExit" in text


def test_models_have_known_shapes(tmp_path, monkeypatch):
    """As small as they go, in several files, of which each tensor is another."""
    assert shapes.config_of("7B").num_key_value_heads == 4
    monkeypatch.setitem(shapes.QWEN, "0.5B", (32, 64, 2, 4, 2, 128, True))
    monkeypatch.setattr(shapes, "SHARD", 5000)
    folder = shapes.make(tmp_path, "0.5B")
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 2 and "lm_head.weight" not in places, "tied"
    values = {}
    for name, file in places.items():
        with safe_open(folder / file, "pt") as opened:
            values[name] = opened.get_tensor(name)
    assert all(value.dtype == torch.bfloat16 for value in values.values())
    assert 0.01 < values["model.layers.0.mlp.up_proj.weight"].std() < 0.03
    pair = (values[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not torch.equal(*pair) and bool((values["model.norm.weight"] == 1).all())
    assert shapes.make(tmp_path, "0.5B") == folder, "made once"


def test_a_part_that_is_not_there_is_refused():
    done = launching.python(HERE, "bitz", "--pretended")
    assert done.returncode == 2 and "bitz: there is bits, bits.beyond" in done.stderr


@pytest.mark.long
@NEEDS_TRITON
@pytest.mark.launch
def test_a_part_on_a_pretended_gpu(tmp_path):
    """What is left out says why; the rest computes, and finds nothing wrong. Two ranks train on one GPU.

    `.ci/run gpu` runs all parts, and fails where one is wrong.
    """
    done = launching.python(HERE, "bits", "--pretended", "--output", tmp_path, timeout=280)
    written = json.loads((tmp_path / "report.json").read_text())["steps"]
    wrong = {step["step"]: step["why"] for step in written if step["state"] == "wrong"}
    assert not wrong and done.returncode == 0, (wrong, done.stderr)
    assert {step["step"]: step["why"] for step in written} == {
        step.name: step.pretended for step in parts.PARTS["bits"]
    }
    figures = {step["step"]: [figure["name"] for figure in step["figures"]] for step in written}
    assert figures["replayed"] == ["lowrank, replayed on the CPU"]
