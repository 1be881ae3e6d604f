"""Every update made again, from a run file's rows."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from mpies.errors import InputError
from mpies.model.anchor import Anchor
from mpies.replica import LoadedModel, load_model
from mpies.run.replaying import needs_anchor, replay, which_generation
from mpies.runfile import History, read_history

CPU = torch.device("cpu")


@pytest.fixture
def loaded(tiny_model) -> LoadedModel:
    settings = {"device": CPU, "dtype": torch.float32, "master": torch.float32, "rank": 0, "threads": 1}
    return load_model(str(tiny_model()), **settings)


@pytest.fixture(scope="module")
def history(finished) -> History:
    return read_history(finished / "run.h5")


def test_every_digest_is_the_files(loaded, history):
    assert replay(loaded.weights, history, 0, 4, every_digest=True) == history.digest.tolist()
    assert loaded.weights.digest() == history.digest[3]


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4), (0, 2, 2, 3, 4)])
def test_parts_make_the_whole(loaded, history, cuts):
    for first, last in itertools.pairwise(cuts):
        (digest,) = replay(loaded.weights, history, first, last)
        assert digest == loaded.weights.digest()
        assert digest == history.digest[last - 1]


def test_without_a_generation_the_digest_is_that_of_what_is_there(loaded, history):
    assert replay(loaded.weights, history, 0, 0) == [history.model_digest]
    assert replay(loaded.weights, history, 2, 2, every_digest=True) == []


def test_progress_adds_up_to_the_whole(loaded, history):
    shares = []
    replay(loaded.weights, history, 1, 4, progress=shares.append)
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert len(shares) == 3 * len(loaded.weights.base)


def test_the_anchor_pulls_where_a_generation_did(loaded, history, tiny_model):
    """By hand, generation by generation, with decay in the second and fourth only."""
    decays = np.array([0, 0.25, 0, 0.5])
    anchored = dataclasses.replace(history, anchor_decay=decays)
    initial = {name: base.clone() for name, base in loaded.weights.base.items()}
    expected = {name: base.clone() for name, base in initial.items()}
    for generation, decay in enumerate(decays):
        loaded.weights.update(*history.directions(generation))
        for name, base in loaded.weights.base.items():
            if decay:
                base += decay * (initial[name] - base)
            expected[name] = base.clone()
    digest = loaded.weights.digest()
    assert digest != history.digest[3]
    for name, base in loaded.weights.base.items():
        base.copy_(initial[name])
    anchor = Anchor(str(tiny_model()), loaded.weights, history.model_digest)
    assert replay(loaded.weights, anchored, 0, 4, anchor=anchor) == [digest]
    assert all(torch.equal(base, expected[name]) for name, base in loaded.weights.base.items())


@pytest.mark.parametrize(
    "first, last, needed", [(0, 4, True), (0, 2, False), (2, 3, True), (3, 4, False), (2, 2, False)]
)
def test_an_anchor_is_needed_where_a_generation_decayed(history, first, last, needed):
    anchored = dataclasses.replace(history, anchor_decay=np.array([0, 0, 0.1, 0]))
    assert needs_anchor(anchored, first, last) is needed
    assert not needs_anchor(history, 0, 4)


@pytest.mark.parametrize("text, generation", [("last", 4), ("0", 0), ("4", 4), ("003", 3), ("best", 2)])
def test_generations_are_named_by_number_or_by_what_they_are(history, text, generation):
    rewards = {0: -3.0, 2: -1.0, 4: -1.5}
    noted = dataclasses.replace(history, evaluated={"held_out": rewards, "train": {4: 9.0}})
    assert which_generation(text, noted) == generation


@pytest.mark.parametrize("text", ["5", "-1", "1.0", "", "first", "²", "1e1", "9" * 20])
def test_other_names_are_refused(history, text):
    with pytest.raises(InputError, match=r"^--generation: given .*, allowed is 0 to 4, last or best"):
        which_generation(text, history)


def test_the_best_needs_held_out_evaluations(history):
    with pytest.raises(InputError, match=r"^--generation best: .* no evaluation on held-out prompts"):
        which_generation("best", dataclasses.replace(history, evaluated={"train": {0: 1.0}}))
