"""What a generation's answers say, against counting them one by one in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpies.es.answers import compare, mark


def count(texts: list[list[str]], rewards: list[list[float]], pairs: list[tuple[int, int]]) -> dict:
    """The same by loops: texts and rewards of members' answers, and which members are pairs."""
    prompts = range(len(texts[0]))
    of_members = [sum(row) / len(row) for row in rewards]
    same = [texts[i][p] == texts[j][p] for i, j in pairs for p in prompts]
    scored = [(i, j) for i, j in pairs if not math.isnan(of_members[i] + of_members[j])]
    known = [[row[p] for row in rewards if not math.isnan(row[p])] for p in prompts]
    return {
        "identical_pairs": sum(same) / len(same),
        "pairs_with_signal": sum(of_members[i] != of_members[j] for i, j in scored) / len(scored),
        "prompts_disagreeing": sum(len(set(values)) > 1 for values in known) / len(known),
        "distinct_answers": sum(len({row[p] for row in texts}) for p in prompts) / len(texts[0]),
    }


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("unscored", [0, 3])
def test_counted_one_by_one(antithetic, unscored):
    random = np.random.default_rng(4)
    members, prompts = 10, 5
    texts = [[f"answer {a}" for a in row] for row in random.integers(0, 4, (members, prompts))]
    rewards = random.integers(0, 2, (members, prompts)).astype(float)
    rewards[random.integers(0, members, unscored), random.integers(0, prompts, unscored)] = math.nan
    pairs = list(zip(range(0, members, 2), range(1, members, 2), strict=True))
    if not antithetic:
        pairs = list(itertools.combinations(range(members), 2))
    seeds = np.arange(members, dtype=np.uint64) // (2 if antithetic else 1)
    marks = np.array([[mark(text) for text in row] for row in texts], dtype=np.uint64)
    found = compare(marks, rewards, rewards.mean(axis=1), seeds)
    for name, expected in count(texts, rewards.tolist(), pairs).items():
        assert getattr(found, name) == pytest.approx(expected), name


def test_marks_are_those_of_the_texts():
    assert mark("a") == mark("a") != mark("a ") and mark("\ud800") != mark("")
    assert mark("Paris") == 0x2490B7DF5667E76B, "on every machine"
