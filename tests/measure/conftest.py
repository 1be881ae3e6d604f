from __future__ import annotations

import numpy as np
import pytest
import small

from mpies.model.initial import InitialWeights, find_initial
from mpies.replica import Replica


@pytest.fixture(scope="module")
def moved(alone, tiny_model, tmp_path_factory):
    """moved(shift, **model): a replica whose base was moved by shift * noise, and its initial weights."""

    def make(shift: float = 0.15, **model) -> tuple[Replica, InitialWeights]:
        folder = tiny_model(**model)
        made = runs.build(model__path=folder)
        initial = find_initial(str(folder), made.weights, made.facts.model_digest, made.facts.model_class)
        if shift:
            made.weights.update(np.array([7], np.uint64), np.array([shift], np.float32))
        made.perturbation.clear()
        return made, initial

    with small.Runs(alone, tiny_model(), tmp_path_factory.mktemp("moved")) as runs:
        yield make
