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
