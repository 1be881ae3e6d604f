from __future__ import annotations

import shutil

import pytest
import small


@pytest.fixture(scope="session")
def trained(alone, tiny_model, tmp_path_factory) -> small.Runs:
    """A run of three generations, which measured KL and drift after each."""
    measures = {"run__kl_samples": 3, "run__measure_drift": True, "run__evaluate_every": 1}
    with small.Runs(alone, tiny_model(), tmp_path_factory.mktemp("trained")) as runs:
        assert runs.train(3, **measures) == 0
    return runs


@pytest.fixture
def run(alone, trained, tmp_path) -> small.Runs:
    """A copy of that run."""
    with small.Runs(alone, trained.model, tmp_path) as runs:
        shutil.copytree(trained.folder, runs.folder)
        yield runs
