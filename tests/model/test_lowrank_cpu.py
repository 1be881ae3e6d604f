"""The fused low-rank products: those of plain matrices, for any shapes, members, ranks and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpies.model import lowrank_cpu
from mpies.noise.cpu import CpuKernels


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("tokens", [(), (1,), (5,)], ids=str)
@pytest.mark.parametrize("width", [1, 17, 600])
def test_add(monkeypatch, threads, rank, tokens, width):
    monkeypatch.setattr(lowrank_cpu, "WORTH_SHARING", 0)
    torch.manual_seed(0)
    members = np.array([1, 0, 0, 2, 1])
    x, y = bfloat16(5, *tokens, 40), bfloat16(5, *tokens, width)
    a, b = bfloat16(3 * rank, width), bfloat16(3 * rank, 40)
    expected = y.double()
    for row, member in enumerate(members):
        for k in range(member * rank, (member + 1) * rank):
            dots = x[row].double() @ b[k].double()
            expected[row] += dots[..., None] * a[k].double()
    share = CpuKernels(threads).share
    lowrank_cpu.add(y, x, members, lowrank_cpu.raw(a), lowrank_cpu.raw(b), rank, share)
    # Rounded once, from sums in float32.
    torch.testing.assert_close(y.double(), expected.bfloat16().double(), atol=1e-5, rtol=2**-7)
    assert (y.double() == expected.bfloat16().double()).double().mean() > 0.99


def test_not_a_number_stays_one():
    y, x = bfloat16(2, 8), bfloat16(2, 4)
    x[0, 1] = torch.nan
    before = y[1].clone()
    a, b = torch.zeros(2, 8).bfloat16(), bfloat16(2, 4)
    raw = lowrank_cpu.raw(a), lowrank_cpu.raw(b)
    lowrank_cpu.add(y, x, np.array([0, 1]), *raw, 1, CpuKernels(1).share)
    assert y[0].isnan().all() and torch.equal(y[1], before)


@pytest.mark.parametrize(
    "tensor, known",
    [(torch.zeros(1), False), (torch.zeros(1).half(), False), (torch.zeros(1).bfloat16(), True)],
)
def test_knows_bfloat16_only(tensor, known):
    assert lowrank_cpu.knows(tensor) is known
