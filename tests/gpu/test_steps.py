"""The test on a GPU, tested without one: what becomes of its steps, and what is reported of them."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import launching
import pytest
import torch
from apart import NEEDS_TRITON
from safetensors import safe_open
from transformers import AutoTokenizer

pytestmark = pytest.mark.lengthy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import parts
import report
import shapes
import steps
from steps import Bench, Figure, LeftOutError, Step, WrongError

from mpies import config
from mpies.tasks import countdown


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


def test_a_step_that_hangs_leaves_time_for_the_next(bench):
    """It gets a few times the seconds that it takes, about, and not all that there are."""

    def hang(bench):
        yield Figure("before", 1.0)
        bench.run("-c", "import time; time.sleep(60)")

    outcome = steps.do(Step("hanging", "it", hang, 1), "bits", bench)
    assert outcome.state == "wrong" and "not done after 3 s" in outcome.why
    assert bench.left > 60


def test_the_same_command_goes_on_with_what_is_left(tmp_path, monkeypatch, capsys):
    """First with what was not done yet, then with what was wrong; what is right is not done again."""
    done = []

    def step(name: str, seconds: float, state: str = "right") -> Step:
        def call(bench: Bench) -> list[Figure]:
            done.append(name)
            bench.deadline -= seconds
            return [Figure("it", 1, "", state)]

        return Step(name, f"the {name}", call, seconds)

    made = [step("one", 60), step("bad", 10, "wrong"), step("two", 60), step("three", 50), step("four", 50)]
    monkeypatch.setattr(parts, "PARTS", {"bits": made})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    call = runpy.run_path(str(HERE / "__main__.py"))["main"]
    given = ["--output", str(tmp_path), "--seconds", "109"]
    assert call(given) == 1 and done == ["one", "bad"]
    assert (
        "3 step(s) wait for time: the same command 2 time(s) more goes on with them"
        in capsys.readouterr().out
    )
    done.clear()
    assert call(given) == 1 and done == ["two", "bad"]
    done.clear()
    made[1] = step("bad", 1)
    assert call(given) == 0 and done == ["three", "four", "bad"]
    assert call(given) == 0 and len(done) == 3 and "bits.one: right already" in capsys.readouterr().out
    assert call(["bits.one", *given]) == 0 and done[3:] == ["one"], "it is named"


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
    late = [steps.do(Step(name, "it", refuse, 1), "bits", bench) for name in ("good", "failing", "absent")]
    report.write(tmp_path, known | {"sources": "others"}, late)
    assert "| the good | **right** (not of these: sources" in (tmp_path / "report.md").read_text()
    known["GPUs"] = ["0, NVIDIA H100, 580.1, 81559 MiB, GPU-1"]
    report.write(tmp_path, known, [mended])
    assert report.states(tmp_path, known | {"GPUs": ["0, NVIDIA H100, 580.1, 81559 MiB, GPU-2"]})
    assert not report.states(tmp_path, known | {"GPUs": ["0, NVIDIA H200, 580.1, 143771 MiB, GPU-1"]})
    known = report.facts(pretended=True)
    old = {name.split(".")[1]: state for name, state in report.states(tmp_path, known).items()}
    assert old == {"good": "right", "broken": "wrong", "failing": "wrong"}


@pytest.mark.parametrize("digests, why", [(["1", "2", "3"], ""), (["1", "1", "1"], "have not changed")])
def test_equal_runs_of_weights_that_do_not_move_are_wrong(tmp_path, monkeypatch, digests, why):
    """Two ranks on a GPU make the run of one, but so does a program that learns nothing."""

    class Done(Bench):
        def run(self, *arguments, **given):
            """Its run file is `content`'s."""

    bench = Done(tmp_path, time.monotonic() + 100, pretended=True)
    monkeypatch.setattr(parts.jobs, "content", lambda *_: {"generation/digest": digests})
    step = Step("shared", "it", parts.shared("hf"), 1)
    outcome = steps.do(step, "engines", bench)
    assert (outcome.state == "wrong") == bool(why) and why in outcome.why


@pytest.mark.parametrize("peak, verdict", [("39.9", "right"), ("41.2", "wrong"), ("0.5", "right")])
def test_memory_is_compared_with_a_configurations_header(peak, verdict):
    """In which every configuration says what its GPU is."""
    found = [Figure("cache", f"9 GB beyond the weights at the peak, {peak} GB in all, 79 GB there")]
    for file in sorted((launching.REPOSITORY / "configs").glob("*.yaml")):
        said = next(line for line in file.read_text().splitlines() if line.startswith("# Memory per GPU"))
        header, compared = parts.compare_memory(said, found)
        assert header.value > 5 and compared.value == float(peak)
        if " 40 GB GPU" in said:
            assert compared.verdict == verdict


def test_models_have_known_shapes(tmp_path, monkeypatch):
    """As small as they go, in several files, of which each tensor is another."""
    assert shapes.config_of("7B").num_key_value_heads == 4
    monkeypatch.setitem(shapes.QWEN, "0.5B", (32, 64, 2, 4, 2, 600, True))
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
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(4, 600)]
    assert all(words) and len({len(word) for word in words[512:]}) > 3, (
        "answers are not empty, nor of one length"
    )


def test_a_prompt_has_about_as_many_tokens_as_a_known_tokenizer_makes():
    """Three to four characters a token: memory and time depend on it."""
    (row,) = countdown.make_task(config.load(["task.name=countdown", "task.train_size=1"]).task).train
    assert 2.5 < len(row["prompt"]) / len(shapes.tokenizer(10_000).encode(row["prompt"])) < 4.5


def test_a_part_that_is_not_there_is_refused():
    done = launching.python(HERE, "bitz", "--pretended")
    assert done.returncode == 2 and "bitz: there is bits, bits.beyond" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
@NEEDS_TRITON
@pytest.mark.launch
def test_a_part_on_a_pretended_gpu(tmp_path):
    """What is left out says why; the rest computes, and finds nothing wrong. Two ranks train on one GPU.

    `.ci/run gpu` runs all parts, and fails where one is wrong.
    """
    done = launching.python(HERE, "bits", "--pretended", "--output", tmp_path, timeout=550)
    written = json.loads((tmp_path / "report.json").read_text())["steps"]
    wrong = {step["step"]: step["why"] for step in written if step["state"] == "wrong"}
    assert not wrong and done.returncode == 0, (wrong, done.stderr)
    assert {step["step"]: step["why"] for step in written} == {
        step.name: step.pretended for step in parts.PARTS["bits"]
    }
    figures = {step["step"]: [figure["name"] for figure in step["figures"]] for step in written}
    assert figures["replayed"] == ["lowrank, replayed on the CPU"]
    assert figures["replaying"] == ["lowrank, replayed on the GPU"] and figures["kernels"] == ["tests"]
