"""On which of several GPUs a kernel is launched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import driver

from mpies.noise import definition
from mpies.noise.gpu import GpuKernels


class OnGpu(torch.Tensor):
    """A tensor that says that it is on GPU 3."""

    is_cuda = property(lambda self: True)

    def get_device(self) -> int:
        return 3


@pytest.fixture
def gpus(monkeypatch):
    """CUDA's calls that make a GPU the current one, as torch makes them."""

    def exchange(number: int) -> int:
        before = driver.active.current
        if number >= 0:
            driver.active.current = number
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    driver.active.launches.clear()
    driver.active.current = 0
    yield driver.active
    driver.active.current = 0


def test_seeds_may_be_numpys():
    base = torch.zeros(1000)
    live = base.clone()
    GpuKernels().perturb(base, live, np.uint64(2**64 - 1), 1, 0.1)
    GpuKernels().round(base, base.bfloat16(), np.uint64(2**64 - 1), 1)
    assert np.array_equal(live.numpy(), definition.perturbed(base.numpy(), 2**64 - 1, 1, 0.1))


def test_kernels_run_where_their_tensors_are(gpus):
    """Whichever GPU is current: Triton would take that one, with pointers into the other one's memory."""
    kernels, tensor = GpuKernels(), torch.zeros(1000).as_subclass(OnGpu)
    seeds, factors = np.array([1], np.uint64), np.array([0.1], np.float32)
    kernels.perturb(tensor, tensor.clone(), 1, 1, 0.1)
    kernels.update(tensor, seeds, factors, 1)
    kernels.lowrank_update(tensor.view(10, 100), seeds, factors, 1, 1)
    kernels.digest(tensor, 1)
    kernels.round(tensor, tensor.bfloat16(), 1, 1)
    named = {launch.kernel: launch.device for launch in gpus.launches if launch.kernel != "_normal"}
    assert named == dict.fromkeys(["_perturb", "_update", "_lowrank_update", "_digest", "_round"], 3)
    assert gpus.current == 0
