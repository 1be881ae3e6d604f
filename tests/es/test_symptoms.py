"""Symptoms: each where it is and only there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpies.es.symptoms import RULES, Course, is_far_below

NAN = math.nan


def said(**figures) -> dict[str, str]:
    course = {"identical_pairs": np.full(12, 0.1), "truncated": np.full(12, 0.2), **figures}
    course = {k: np.array(v) if isinstance(v, list) else v for k, v in course.items()}
    found = {name: rule(Course(**course)) for name, rule in RULES.items()}
    return {name: text for name, text in found.items() if text}


def test_a_run_in_order():
    parts = {"accuracy": np.full(12, 0.7), "brevity": np.full(12, 0.6)}
    assert said(cosines=parts) == {}
    assert said(identical_pairs=[], truncated=[]) == {}
    assert said(identical_pairs=[NAN] * 12, truncated=[NAN] * 12) == {}


def test_answers_that_are_all_the_same():
    found = said(identical_pairs=[0.1, 0.6, 0.9, 0.75])
    assert list(found) == ["identical"] and found["identical"].startswith("75 % of the pairs")
    assert "larger es.sigma" in found["identical"]
    assert said(identical_pairs=[0.9, 0.9, 0.4, 0.9]) == {}, "not three in a row"


def test_truncation_that_grows():
    found = said(truncated=[0.05, 0, 0.1, 0.1, 0.2, 0.3, 0.25])
    assert list(found) == ["truncated"] and "25 % of the answers are cut off" in found["truncated"]
    assert ", 5 % at first" in found["truncated"]
    assert said(truncated=[0.9] * 12) == {}, "it has been so from the beginning"
    assert said(truncated=[0, 0, 0, 0.9]) == {}, "too few to tell"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_part_that_takes_the_update(sign):
    """Whether it is a part of the reward, or the length, which nobody asked for."""
    cosines = {"format": np.full(10, 0.1), "answer_tokens": np.full(10, 0.95 * sign)}
    found = said(cosines=cosines, parts=frozenset({"format", "style"}))
    assert list(found) == ["taken over"] and "answer_tokens" in found["taken over"]
    assert (
        "90 % of it" in found["taken over"] and "format has little part in it (0.10)" in found["taken over"]
    )
    assert said(cosines=cosines) == {}, "format is no part of the reward"


def test_accuracy_that_does_not_move():
    """In the mean over ten generations; where all members have the same, it has no part."""
    taken = {"format": np.full(10, 0.97)}
    none = np.array([NAN, 0.2] * 5)
    found = said(cosines={**taken, "accuracy": none}, parts=frozenset({"format", "accuracy"}))
    assert "accuracy has little part in it (0.10)" in found["taken over"]
    assert said(cosines={**taken, "accuracy": np.full(10, 0.5)}) == {}
    assert said(cosines={**taken, "accuracy": none[:9]}) == {}, "not known for ten generations"
    assert said(cosines={"accuracy": np.full(10, 0.97), "format": none}) == {}, "accuracy is all there is"


def test_members_far_below_the_unperturbed_model():
    means, deviations = np.array([0.5, 0.1, 0.1, 0.1]), np.full(4, 0.1)
    assert is_far_below(means, deviations, 0.5, 0.0)
    assert not is_far_below(means, deviations, 0.29, 0.0), "not by two deviations"
    assert not is_far_below(means, deviations, 0.5, 0.15), "other prompts may be as much harder"
    assert not is_far_below(means[:3], deviations[:3], 0.5, 0.0), "for two generations only"
    assert not is_far_below(means, np.zeros(4), 0.5, 0.0), "no spread at all is another symptom"
