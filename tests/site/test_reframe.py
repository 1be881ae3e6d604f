"""The ReFrame test of packaging/ runs, by itself and through a Slurm; what monitoring reads of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
import tiny
from cluster import Cluster, running

FOLDER = launching.REPOSITORY / "packaging" / "reframe"
SETTINGS = "task.name=conciseness,engine.max_new_tokens=4,es.perturbation=full,run.slurm_comment=true"
# Prints the samples of a file, as Prometheus reads it.
PARSE = """
import json, sys
from prometheus_client.parser import text_string_to_metric_families
families = list(text_string_to_metric_families(open(sys.argv[1]).read()))
print(json.dumps([[family.type, *family.samples[0][:3]] for family in families]))
"""


def reframe(tools: Path, folder: Path, partition: str, **environment: str) -> dict[str, dict]:
    """The ReFrame test with a tiny model: each of its cases, as ReFrame reports it."""
    model = tiny.save_model(folder / "model")
    words = ["-C", FOLDER / "settings.py", "-c", FOLDER / "mpies_check.py"]
    words += ["--system", f"site:{partition}", "--prefix", folder, "-r"]
    words += ["--report-file", folder / "report.json"]
    variables = {"python": sys.executable, "population": 4, "prompts": 2, "generations": 3}
    variables["settings"] = f"model.path={model},run.metrics={folder}/run.prom,{SETTINGS}"
    words += [word for name, value in variables.items() for word in ("-S", f"{name}={value}")]
    launching.output_of(tools / "python", tools / "reframe", *words, cwd=folder, **environment)
    report = json.loads((folder / "report.json").read_text())
    return {case["ranks"]: case for one in report["runs"] for case in one["testcases"]}


def assert_measured(cases: dict[str, dict]) -> None:
    assert {ranks: (case["result"], case["num_tasks"]) for ranks, case in cases.items()} == {
        "one": ("pass", 1),
        "several": ("pass", 2),
    }
    for case in cases.values():
        figures = {name.rpartition(":")[2]: value for name, (value, *_) in case["perfvalues"].items()}
        seconds, answers = figures["seconds_a_generation"], figures["answers_a_second"]
        assert seconds > 0 and answers == pytest.approx(8 / seconds)


def test_reframe_by_itself(tools, tmp_path):
    assert_measured(reframe(tools, tmp_path, "here"))
    parsed = launching.output_of(tools / "python", "-c", PARSE, tmp_path / "run.prom", cwd=tmp_path)
    samples = json.loads(parsed)
    assert {(kind, *labels) for kind, _, labels, _ in samples} == {("gauge", "run")}
    assert {Path(labels["run"]).name for _, _, labels, _ in samples} == {"run"}
    values = {name: value for _, name, _, value in samples}
    assert values["mpies_generations"] == values["mpies_generations_target"] == 3
    assert values["mpies_seconds_left"] == 0 and values["mpies_generation_seconds"] > 0


@pytest.fixture
def slurm() -> Iterator[Cluster]:
    with running() as cluster:
        yield cluster


def test_reframe_on_slurm(tools, tmp_path, slurm):
    cases = reframe(tools, tmp_path, "batch", **slurm.environment)
    assert_measured(cases)
    for case in cases.values():
        assert "Comment=mpies: generation 3/3, reward " in slurm.command(
            "scontrol", "show", "job", case["jobid"]
        )
