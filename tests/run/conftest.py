from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small

GENERATIONS = 4


@pytest.fixture
def runs(alone, tiny_model, tmp_path):
    """Jobs of one rank in this process; see small.py."""
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        yield runs


@pytest.fixture(scope="session")
def finished(alone, tiny_model, tmp_path_factory) -> Path:
    """The folder of a run of four generations with checkpoints of 2 and 4, evaluated after 0, 2 and 4."""
    with small.Runs(alone, tiny_model(), tmp_path_factory.mktemp("finished")) as runs:
        assert runs.train(GENERATIONS, run__evaluate_every=2, run__checkpoint_every=2) == 0
    return runs.folder


@pytest.fixture
def again(runs, finished) -> small.Runs:
    """Jobs that find a copy of that run."""
    shutil.copytree(finished, runs.folder)
    return runs
