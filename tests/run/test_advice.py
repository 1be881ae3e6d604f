"""Warnings about runs that do not learn: one line each, once, and none about runs that do."""

from __future__ import annotations

import numpy as np
import pytest

from jobs import arguments, train
from mpies.es.answers import Agreement
from mpies.es.fitness import coefficients
from mpies.run.advice import Advisor
from mpies.run.telemetry import Diagnosis

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


def test_episodes_that_hardly_ever_come_to_an_end_of_their_own(advisor):
    advisor.hear(0, [], 0.9)
    assert advisor.said == []
    advisor.hear(1, [], 0.96)
    advisor.hear(2, [], 1.0)
    (line,) = advisor.said
    assert line.startswith("warning: generation 2: a limit has ended 96% of the episodes")


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


def test_members_far_below_in_the_mean(advisor):
    """Though one of them is better than the unperturbed model, by luck."""
    advisor.unperturbed, advisor.error = 0.9, 0.0
    far = [0.0] * 15 + [1.0]
    (line,) = advisor.see(*[far] * 4)
    assert line.startswith("warning: generation 3: ") and "the members' mean (0.0625 +- 0.24 now)" in line
    assert "smaller es.sigma" in line and "\n" not in line


def test_other_prompts_may_be_as_much_harder(advisor):
    advisor.unperturbed, advisor.error = 0.9, 0.3
    assert advisor.see(*[[0.0] * 15 + [1.0]] * 4) == []


def told(identical: float = 0.1, truncated: float = 0.0, **cosines: float) -> Diagnosis:
    return Diagnosis(Agreement(identical, 0.9, 0.9, 2.0), truncated, cosines=cosines)


@pytest.mark.parametrize(
    ("findings", "generation", "words"),
    [
        ([told(identical=0.8)] * 9, 3, "80 % of the pairs of answers to a prompt are identical"),
        ([told()] * 3 + [told(truncated=0.5)] * 6, 6, "50 % of the answers are cut off"),
        ([told(style=0.99, accuracy=0.0)] * 15, 10, "the update is that of style alone"),
    ],
)
def test_what_answers_tell(advisor, findings, generation, words):
    """Once, in the generation in which it is seen; see tests/es/test_symptoms.py."""
    for number, found in enumerate(findings):
        advisor.look(number, np.array([1.0, 2.0]), np.array([-1.0, 1.0]), found)
    (line,) = advisor.said
    assert line.startswith(f"warning: generation {generation}: {words}") and "\n" not in line


@pytest.mark.launch
def test_in_a_run(tmp_path, tiny_model):
    """Perturbations that are too small to change an answer."""
    output = train(2, *arguments(tiny_model(), tmp_path, 3, es__sigma=1e-9))
    same, identical = [line for line in output.splitlines() if "warning: " in line]
    assert "generation 1: all members have the reward" in same
    assert "generation 3: 100 % of the pairs of answers to a prompt are identical" in identical


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


@pytest.mark.long
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
