"""These tests run in one MPI world: mpirun -n N python -m pytest --with-mpi tests/mpi

Every rank runs every test. `tiny` and the fixtures of tests/conftest.py are at hand here too.
"""

from __future__ import annotations

import sys
import time

import pytest


@pytest.fixture(scope="session")
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def shared_model(world, tiny_model):
    """Like tiny_model, but all ranks get rank 0's folder. Every rank has to ask alike."""
    return lambda **options: world.bcast(tiny_model(**options))


def pytest_exception_interact(node, report):
    """A rank whose test fails would leave the others waiting for it: show why, and end them all."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.size == 1:
        return
    capture = node.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nrank {world.rank} of {world.size}: {report.nodeid}", file=sys.stderr)
        for title, text in report.sections:
            print(f"{title}:\n{text}", file=sys.stderr)
        print(report.longreprtext, file=sys.stderr)
        sys.stderr.flush()
        time.sleep(0.5)  # the launcher has to pass this on before it ends everything
        world.Abort(1)
