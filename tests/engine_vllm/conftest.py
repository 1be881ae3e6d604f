"""These tests run where vLLM is installed: make test-vllm. Elsewhere they are not collected; nor are those
that need a GPU, without one."""

from __future__ import annotations

import pytest
import torch

from mpies.engines import vllm

collect_ignore_glob = [] if vllm.version() else ["test_*.py"]
collect_ignore = [] if torch.cuda.is_available() else ["test_vllm_on_gpu.py"]


@pytest.fixture(scope="session")
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Side by side, every job is by itself; the other tests of a file share models, and so a process."""
    for item in items:
        if item.path.parent.name == "engine_vllm" and item.path.stem != "test_vllm_job":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
