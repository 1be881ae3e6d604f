"""The part of a run file that determines the weights, up to a generation."""

from __future__ import annotations

from dataclasses import replace

import made_up
import numpy as np
import pytest

from mpies.es import fitness
from mpies.es.directions import directions
from mpies.runfile import History, read_history

COLUMNS = ("seed", "sign", "reward", "coefficient", "alpha", "anchor_decay", "digest", "seconds")


@pytest.fixture(scope="module")
def history(tmp_path_factory) -> History:
    """Of 30 generations, evaluated after 0, 10, 20 and 30."""
    return read_history(made_up.write_run(tmp_path_factory.mktemp("run"), generations=30, evaluate_every=10))


@pytest.mark.parametrize(
    "generations, evaluated", [(30, [0, 10, 20, 30]), (29, [0, 10, 20]), (10, [0, 10]), (9, [0]), (0, [0])]
)
def test_the_first_generations_come_with_the_evaluations_up_to_the_last_of_them(
    history, generations, evaluated
):
    """Generation 10 was evaluated after ten updates: those of its own weights belong to it."""
    part = history.first(generations)
    assert part.generations == generations
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(part, column), getattr(history, column)[:generations])
    assert {split: list(rewards) for split, rewards in part.evaluated.items()} == {
        "train": evaluated,
        "held_out": evaluated,
    }
    assert part.held_out == {g: history.held_out[g] for g in evaluated}
    assert part.unperturbed == history.evaluated["train"][evaluated[-1]]
    assert (part.run_uuid, part.settings) == (history.run_uuid, history.settings)


def test_a_run_that_was_never_evaluated(history):
    part = replace(history, evaluated={})
    assert part.unperturbed is None and part.held_out == {}


def test_the_update_is_made_from_rewards_not_from_what_was_logged(history):
    for generation in (0, 17):
        coefficients = fitness.coefficients(history.reward[generation], history.alpha[generation])
        np.testing.assert_array_equal(history.coefficients(generation), coefficients)
        expected = directions(history.seed[generation], history.sign[generation], coefficients)
        for found, wanted in zip(history.directions(generation), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
