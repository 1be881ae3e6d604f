"""The distance from the initial weights, against NumPy on the model's files."""

from __future__ import annotations

import math

import pytest
import threads
import torch
from safetensors.torch import load_file

from mpies.measure import drift
from mpies.measure.drift import groups_of, measure_drift, squared_distance


@pytest.mark.parametrize("model", [{"kind": "llama", "tied": True}, {"kind": "qwen2", "tied": False}])
def test_drift_by_groups(alone, moved, tiny_model, model):
    made, initial = moved(**model)
    before = load_file(tiny_model(**model) / "model.safetensors")
    squares: dict[str, float] = {}
    for name, base in made.weights.base.items():
        group = "other"
        if ".layers." in name:
            group = f"layer {name.split('.')[2]}"
        elif "embed" in name or "lm_head" in name:
            group = "embedding" if "embed" in name else "head"
        difference = base.double().numpy() - before[name].double().numpy()
        squares[group] = squares.get(group, 0.0) + float((difference**2).sum())
    found = measure_drift(alone, made, initial)
    assert next(iter(found)) == "all"
    expected = {"all": sum(squares.values()), **squares}
    assert found == pytest.approx({group: math.sqrt(value) for group, value in expected.items()})
    assert set(found) == {"all", "embedding", "layer 0", "layer 1", "other"} | (
        set() if model["tied"] else {"head"}
    )
    # theta - theta_0 = 0.15 noise, of variance 0.15^2.
    assert found["all"] == pytest.approx(0.15 * math.sqrt(made.weights.size), rel=0.03)


def test_ranks_share_the_parameters_and_find_the_same(alone, moved):
    made, initial = moved()
    expected = measure_drift(alone, made, initial)
    for ranks in (2, 5):
        assert threads.run(ranks, lambda comm: measure_drift(comm, made, initial)) == [expected] * ranks


def test_the_initial_model_has_not_moved(alone, moved):
    made, initial = moved(shift=0)
    assert set(measure_drift(alone, made, initial).values()) == {0.0}


def test_squares_are_summed_in_pieces_and_in_double(monkeypatch):
    monkeypatch.setattr(drift, "PIECE", 7)
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    expected = ((a.double() - b.double()) ** 2).sum()
    assert squared_distance(a, b) == pytest.approx(float(expected), rel=1e-14)
    # In float32, the small ones would be lost beside the large one.
    large, small = torch.full((1, 9), 1e-4), torch.zeros(1, 9)
    large[0, 0] = 100
    assert squared_distance(large, small) - 1e4 == pytest.approx(8e-8, rel=0.01)


def test_a_layer_is_the_first_number_in_a_name(moved):
    made, _ = moved(shift=0)
    names = list(made.weights.base)
    found = groups_of(made.model, names)
    assert list(found) == names
    for name in names:
        if ".layers." in name:
            assert found[name] == f"layer {name.split('.layers.')[1].split('.')[0]}"
