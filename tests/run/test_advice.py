"""Warnings about runs that do not learn: one line each, once, and none about runs that do."""

from __future__ import annotations

import numpy as np
import pytest

from jobs import arguments, train
from mpies.es.fitness import coefficients
from mpies.run.advice import Advisor

NAN = float("nan")


@pytest.fixture
def advisor():
    """With the lines it says, as `said`, and generations looked at by `see`."""
    said: list[str] = []
    made = Advisor(said.append)
    made.said = said

    def see(*generations: list[float]) -> list[str]:
        for number, rewards in enumerate(generations):
            made.look(number, np.array(rewards), coefficients(np.array(rewards), 1.0))
        return said

    made.see = see
    return made


def test_a_run_that_learns_is_not_disturbed(advisor):
    advisor.unperturbed = -5.0
    assert advisor.see([-4.0, -6.0], [-8.0, -7.0], [-9.0, -6.0], [-5.0, -6.0], [-8.0, -9.0]) == []


def test_no_spread(advisor):
    (line,) = advisor.see([-1.0, -2.0], [-3.0] * 4, [-3.0] * 4)
    assert line.startswith("warning: generation 2: all members have the reward -3")
    assert "es.sigma" in line and "\n" not in line


def test_no_spread_among_those_that_were_scored(advisor):
    assert len(advisor.see([-1.0, NAN, -1.0])) == 1


def test_a_single_score_is_no_spread_to_speak_of(advisor):
    assert advisor.see([-1.0, NAN]) == []


def test_members_below_the_unperturbed_model(advisor):
    advisor.unperturbed = -5.0
    (line,) = advisor.see(*[[-80.0, -6.0]] * 10)
    assert line.startswith("warning: generation 3: ") and "(-6 now)" in line and "(-5)" in line
    assert "smaller es.sigma" in line and "\n" not in line


def test_without_an_evaluation_there_is_nothing_to_compare_with(advisor):
    assert advisor.see(*[[-80.0, -6.0]] * 10) == []


def test_one_line_for_each_condition(advisor):
    advisor.unperturbed = -5.0
    assert len(advisor.see(*[[-80.0, -6.0], [-7.0, -7.0]] * 6)) == 2


@pytest.mark.launch
def test_in_a_run(tmp_path, tiny_model):
    """Perturbations that are too small to change an answer."""
    output = train(2, *arguments(tiny_model(), tmp_path, 3, es__sigma=1e-9))
    (line,) = [line for line in output.splitlines() if "warning: " in line]
    assert "generation 1: all members have the reward" in line


REWARD = """
import json
from pathlib import Path

first = Path(__file__).with_name("first.json")

def judge(prompts, completions, **columns):
    if not first.exists():
        first.write_text(json.dumps(completions))
    base = json.loads(first.read_text())
    return [0.0 if c == f else -1.0 - sum(map(ord, c)) % 50 for c, f in zip(completions, base)]
"""


@pytest.mark.launch
def test_a_job_that_goes_on_knows_the_unperturbed_model(tmp_path, tiny_model):
    """Only what the unperturbed model answers is good, and nothing is learned (alpha is 0)."""
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 + 5 ="}\n{"prompt": "Can penguins fly?"}\n')
    given = [f"task.train_data={tmp_path}/prompts.jsonl", f"task.reward={tmp_path}/rewards.py:judge"]
    given += arguments(tiny_model(), tmp_path / "run", 2, es__alpha=0, es__sigma=1)
    outputs = [train(1, *given, "task.name=custom", f"es.generations={n}") for n in (2, 5)]
    warnings = [
        [line for line in output.splitlines() if "even the best member" in line] for output in outputs
    ]
    assert not warnings[0]
    assert "generation 5: for 3 generations, even the best member" in warnings[1][0]
