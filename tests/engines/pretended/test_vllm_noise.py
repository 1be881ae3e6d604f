"""What vLLM's layers add of a block's noise on a pretended GPU: the CPU's numbers, an operation a layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretended_gpu import DEVICE, counting
from triton.runtime import driver

from mpies.engines.vllm import noise
from mpies.engines.vllm.members import Members
from mpies.engines.vllm.noise import MatrixNoise
from mpies.model.lowrank_cpu import at_once

CPU = torch.device("cpu")
BLOCK, TOKENS = 3, 6  # the last two pad a graph: nobody's
PARTS = {"qkv": [16, 8, 8], "gate_up": [24, 24], "one": [40]}


@pytest.fixture(autouse=True)
def on_pretended_gpu():
    with counting():
        yield


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def members_on(device: torch.device) -> Members:
    made = Members(BLOCK, 8, device)
    made.assign([2, 0, 1], np.array([1, 2, 1]))
    if device == CPU:
        made.tokens.count = TOKENS
    return made


def matrix_on(device: torch.device, sizes: list[int], biased: bool = True) -> MatrixNoise:
    rows = sum(sizes)
    bias = numbers(rows).to(device) if biased else None
    made = MatrixNoise(numbers(rows, 20).to(device), sizes, BLOCK, 2, bias=bias)
    for buffer in (made.a, made.b, made.bias):
        if buffer is not None:
            buffer[:BLOCK].copy_(numbers(*buffer[:BLOCK].shape).to(device))
    return made


def launches_of(call) -> tuple[torch.Tensor, list[str], int]:
    """What it computes, the kernels that it launches, and other operations of a GPU."""
    call()
    driver.active.launches.clear()
    with counting() as counted:
        found = call()
    kernels = [launch.kernel for launch in driver.active.launches]
    others = {name: n for name, n in counted.operations.items() if not name.startswith("add_")}
    assert not counted.waits and not counted.uploads
    return found.cpu(), kernels, sum(others.values())


@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_takes_one_operation_more(sizes, biased):
    y, x = numbers(TOKENS, sum(sizes)), numbers(TOKENS, 20)
    expected = matrix_on(CPU, sizes, biased).add(y.clone(), x, members_on(CPU).tokens, at_once)
    made, owners, given = matrix_on(DEVICE, sizes, biased), members_on(DEVICE).tokens, x.to(DEVICE)
    target = y.to(DEVICE)
    _, kernels, others = launches_of(lambda: made.add(target, given, owners, at_once))
    assert (kernels, others) == (["_add_parts"], 0)
    found = made.add(y.to(DEVICE), given, owners, at_once).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found[4:], y[4:]), "nobody's"


def test_an_embedding_takes_one_operation_more():
    y, ids = numbers(TOKENS, 20), torch.tensor([3, 0, 7, 7, 1, 2])
    expected = matrix_on(CPU, [40]).look_up(y.clone(), ids, members_on(CPU).tokens)
    made, owners, tokens = matrix_on(DEVICE, [40]), members_on(DEVICE).tokens, ids.to(DEVICE)
    target = y.to(DEVICE)
    _, kernels, others = launches_of(lambda: made.look_up(target, tokens, owners))
    assert (kernels, others) == (["_add_looked_up"], 0)
    found = made.look_up(y.to(DEVICE), tokens, owners).cpu()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("heads", [(), (2,)], ids=str)
def test_a_norm_is_one_operation_in_place_of_vllms(summed, plus_one, heads):
    x, vectors = numbers(TOKENS, *heads, 33), numbers(BLOCK + 1, 33)
    residual = numbers(TOKENS, *heads, 34)[..., 1:].contiguous() if summed else None
    given = x, None if residual is None else residual.clone(), vectors
    expected = noise.rms_norm(*given, members_on(CPU).tokens, 1e-5, plus_one)
    on_gpu = [None if one is None else one.to(DEVICE) for one in (x, residual, vectors)]
    owners = members_on(DEVICE).tokens
    found, sums = noise.rms_norm(*on_gpu, owners, 1e-5, plus_one)
    torch.testing.assert_close(found.cpu(), expected[0], atol=1e-5, rtol=1e-5)
    if summed:
        torch.testing.assert_close(sums.cpu(), expected[1])
    _, kernels, others = launches_of(lambda: noise.rms_norm(*on_gpu, owners, 1e-5, plus_one)[0])
    assert (kernels, others) == (["_rms_norm"], 0)
