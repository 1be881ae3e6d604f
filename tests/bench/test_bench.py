"""The bench: its figures are there, are consistent, and are not mistaken for reached targets."""

from __future__ import annotations

import json

import launching
import pytest

from mpies.bench.report import Result
from mpies.bench.timing import Case, in_turns

SMALL = ["--size", "20000", "--repeats", "1", "--members", "4", "--tokens", "3"]


def test_cases_take_turns_and_the_first_round_does_not_count():
    calls = []
    cases = {
        name: Case(lambda name=name: calls.append(name), before=lambda: calls.append("-")) for name in "ab"
    }
    timings = in_turns(cases, 2, synchronize=lambda: None)
    assert "".join(calls) == "-a-b" * 3
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    timings = in_turns({}, 1, synchronize=lambda: None)
    timings.seconds = {"slow": [10.0, 40.0, 9.0], "fast": [1.0, 2.0, 3.0]}
    assert timings.ratio("slow", "fast") == 10  # of 10, 20 and 3
    assert timings["slow"] == 10


@pytest.mark.parametrize(
    "value, bounds, verdict",
    [
        (15.0, {"least": 15}, ">= 15: reached"),
        (14.9, {"least": 15}, ">= 15: missed"),
        (4.9, {"most": 5}, "< 5: reached"),
        (5.0, {"most": 5}, "< 5: missed"),
        (5.0, {}, ""),
    ],
)
def test_verdicts(value, bounds, verdict):
    assert Result("group", "name", value, "s", **bounds).verdict == verdict


@pytest.mark.launch
def test_all_parts_run_on_two_ranks(tmp_path, tiny_model):
    file = tmp_path / "bench.json"
    model = ["--model", tiny_model(), "--dtype", "float32"]
    done = launching.mpirun(2, "-m", "mpies.bench", *model, *SMALL, "--json", file, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["facts"]["ranks"] == 2 and result["facts"]["dtype"] == "float32"
    figures = {figure["name"]: figure for figure in result["figures"]}
    for name in (
        "perturb",
        "update",
        "digest",
        "low rank",
        "low rank: update with 512 directions",
        "2 ranks against 1",
        "share that is not inference",
        "a task's generation, without its update",
    ):
        assert figures[name]["value"] > 0
        assert name in done.stdout
    parts = sum(figures[f"low rank: {phase}"]["value"] for phase in ("perturb", "generate", "update"))
    assert parts < 3 * figures["low rank"]["value"]
    memory = [f for f in result["figures"] if f["group"].startswith("peak memory")]
    assert memory and all(figure["verdict"].endswith("reached") for figure in memory)


@pytest.mark.launch
def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = launching.python("-m", "mpies.bench", "--model", tmp_path / "none", "--only", "memory")
    assert done.returncode == 2
    assert len(launching.problems(done.stderr)) == 1 and "Traceback" not in done.stderr
