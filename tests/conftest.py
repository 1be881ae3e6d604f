from __future__ import annotations

import os

# Before any test imports transformers, which reads it once: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if target := os.environ.get("MPIES_STAND_IN_GPU"):
    # What tests of kernels call is compiled for this GPU, and its PTX emulated: see noise/test_compiled.py.
    import stand_in_gpu

    stand_in_gpu.StandIn(target).activate()
elif not torch.cuda.is_available():
    # Read when triton is imported: its kernels run on the CPU, operation by operation.
    os.environ["TRITON_INTERPRET"] = "1"

import tiny
from skips import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Builds tiny models once per session: tiny_model(kind="llama", tied=True, ...) -> folder."""
    built = {}

    def build(**options):
        key = tuple(sorted(options.items(), key=lambda item: item[0]))
        if key not in built:
            built[key] = tiny.save_model(tmp_path_factory.mktemp("model"), **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def alone():
    """A communicator of this process alone."""
    from mpi4py import MPI

    from mpies.ranks import collectives

    collectives.set_timeout(MPI.COMM_SELF, 60)
    return MPI.COMM_SELF


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory):
    """A folder for what Triton compiles, which all tests of a session share, in any process."""
    mine = tmp_path_factory.getbasetemp()
    return (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "triton"
