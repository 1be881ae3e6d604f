"""Errors that are planted in the compiled kernels are found: so the other tests see what they look at."""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch
from triton.runtime import driver

from mpies.noise import definition
from mpies.noise.gpu import GpuKernels

KERNELS = GpuKernels()
SEEDS, FACTORS = np.array([3, 2**64 - 5], np.uint64), np.array([0.1, -0.3], np.float32)


def base() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.05, 1700).astype(np.float32)


def updates_right() -> bool:
    tensor = torch.from_numpy(base())
    KERNELS.update(tensor, SEEDS, FACTORS, 77, 5)
    return np.array_equal(tensor.numpy(), definition.updated(base(), SEEDS, FACTORS, 77, 5))


@pytest.fixture
def plant():
    """Put an error into the kernel that was launched last."""
    file = driver.active.launches[-1].files["ptx"] if updates_right() else None
    assert file, "without an error it is right"

    def write(old: str, new: str) -> None:
        text = file.read_text()
        assert old in text
        driver.active.programs[str(file)] = ptx.Program(text.replace(old, new))

    yield write
    del driver.active.programs[str(file)]


@pytest.mark.parametrize(
    "old, new",
    [
        ("-845247145", "-845247144"),  # a multiplier of Philox
        ("mul.hi.u32", "mul.lo.s32"),
        ("xor.b32", "or.b32"),
        ("setp.lt.s64", "setp.le.s64"),  # the end of the tensor
    ],
)
def test_an_error_in_the_integers(plant, old, new):
    plant(old, new)
    try:
        assert not updates_right()
    except ptx.Refused:
        assert "le" in new, "beyond the tensor"


def test_another_order_of_rounding(plant):
    """A sum that begins with the base, or any other order, has other bits."""
    form = "f32x2" if "add.rn.f32x2" in driver.active.launches[-1].files["ptx"].read_text() else "f32"
    plant(f"add.rn.{form}", f"sub.rn.{form}")
    assert not updates_right()


@pytest.mark.parametrize("how", ["fma.rn.f32", "mul.rn.ftz.f32", "mul.f32", "rcp.approx.f32"])
def test_other_arithmetic_is_refused(plant, how):
    plant("bar.sync \t0;", f"{how} %r1, %r1, %r1, %r1;")
    with pytest.raises(ptx.Refused, match=how.split(".")[0]):
        updates_right()
