"""These tests run where vLLM is installed: make test-vllm. Elsewhere they are not collected."""

from __future__ import annotations

import pytest

from mpies.engines import vllm

collect_ignore_glob = [] if vllm.version() else ["test_*.py"]


@pytest.fixture(scope="session")
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD
