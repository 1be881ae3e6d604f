"""A kernel set is tried against the definition: wrong bits are found, whichever verb makes them."""

from __future__ import annotations

import pytest
import torch

from mpies.errors import InputError
from mpies.noise import definition
from mpies.noise.cpu import CpuKernels
from mpies.noise.device import DeviceKernels
from mpies.noise.trial import find_wrong
from mpies.ranks import gpu

CPU = torch.device("cpu")


class Wrong(DeviceKernels):
    """A bit of one verb's result is wrong."""

    def __init__(self, verb: str):
        self.verb = verb

    def spoil(self, verb: str, tensor: torch.Tensor) -> None:
        if verb == self.verb:
            tensor.view(-1)[-1:].view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.itemsize]).add_(
                1
            )

    def perturb(self, base, live, *rest):
        super().perturb(base, live, *rest)
        self.spoil(f"perturb {live.dtype}", live)

    def update(self, base, *rest):
        super().update(base, *rest)
        self.spoil("update", base)

    def normal(self, *given):
        made = super().normal(*given)
        self.spoil("normal", made)
        return made

    def lowrank_update(self, base, *rest):
        super().lowrank_update(base, *rest)
        self.spoil("lowrank_update", base)

    def digest(self, *given):
        made = super().digest(*given)
        self.spoil("digest", made)
        return made

    def round(self, value, base, *rest):
        super().round(value, base, *rest)
        self.spoil("round", base)


@pytest.mark.parametrize("kernels", [CpuKernels(2), DeviceKernels(), Wrong("none")])
def test_right_kernels(kernels):
    assert find_wrong(kernels, CPU) is None


@pytest.mark.parametrize(
    "verb, told",
    [
        *((f"perturb {dtype}", "perturb") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ("update", "update"),
        ("normal", "lowrank_update"),  # which is made of its numbers
        ("lowrank_update", "lowrank_update"),
        ("digest", "digest"),
        ("round", "round"),
    ],
)
def test_a_wrong_bit_is_found(verb, told, monkeypatch):
    assert find_wrong(Wrong(verb), CPU) == told
    monkeypatch.setattr(gpu, "kernels_for", lambda device, threads: Wrong(verb))
    with pytest.raises(InputError, match=rf"^model\.device: cpu: the kernel '{told}' computes other bits"):
        gpu.try_kernels(CPU)


def test_stale_code_is_found_on_a_cpu_too(monkeypatch):
    """As when what a compiled kernel took its constants from has changed."""
    monkeypatch.setattr(definition, "STREAM_ROUNDING", definition.STREAM_ROUNDING + 1)
    with pytest.raises(InputError, match=r"the kernel 'round' computes other bits .* delete \*\.nbi and"):
        gpu.make_ready(CPU)
