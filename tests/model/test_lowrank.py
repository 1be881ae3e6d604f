"""Low-rank noise: its definition and kernels, and a block of members against their materialised weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Member
from mpies.model import loading, lowrank
from mpies.model.lowrank import LowRank
from mpies.model.weights import Weights, take_over
from mpies.noise import definition, factors
from mpies.noise.cpu import CpuKernels
from mpies.noise.device import DeviceKernels

SIGMA = 0.05
MEMBERS = [Member(0, 5, 1), Member(1, 5, -1), Member(2, 2**63 + 8, 1)]
KERNELS = {
    "cpu": CpuKernels(1),
    "cpu, 3 threads": CpuKernels(3),
    "device": DeviceKernels(),
}
if find_spec("triton"):
    from mpies.noise.gpu import GpuKernels

    KERNELS["gpu"] = GpuKernels()


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (2, 600)])
def test_update_has_the_definitions_bits(kernels, rank, shape):
    base = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    seeds = np.array([3, 2**63 + 9, 11], dtype=np.uint64)
    coefficients = np.array([0.1, -0.3, 0.01], dtype=np.float32)
    expected = definition.lowrank_updated(base, seeds, coefficients, 77, rank)
    updated = torch.from_numpy(base.copy())
    kernels.lowrank_update(updated, seeds, coefficients, 77, rank)
    assert np.array_equal(updated.numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.lengthy
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(37, 53), (2, 600), (600, 2)])
def test_update_in_tiles_has_the_same_bits(kernels, rank, shape, monkeypatch):
    monkeypatch.setattr(factors, "PANEL", 300)  # 33 or 100 rows and columns of 3 directions
    monkeypatch.setattr(factors, "LEAST", 1)
    test_update_has_the_definitions_bits(kernels, rank, shape)


def test_an_update_never_holds_the_factors_of_all_directions(monkeypatch):
    """A thousand directions' factors are several times their matrix."""
    drawn = []

    class Counted(CpuKernels):
        def normal(self, count, seeds, *rest):
            drawn.append(count * len(seeds))
            return super().normal(count, seeds, *rest)

    base, seeds = torch.zeros(6000, 10), np.arange(1, 6001, dtype=np.uint64)
    Counted(2).lowrank_update(base, seeds, np.full(6000, 1e-4, np.float32), 77, 1)
    assert max(drawn) <= factors.PANEL < 6000 * 6000


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_a_block_drawn_in_parts_has_the_definitions_factors(at_once, monkeypatch, tiny_model):
    monkeypatch.setattr(lowrank, "PANEL", at_once)
    model, _ = loading.load(str(tiny_model(kind="llama", tied=True)), allow_download=False)
    weights = take_over(model, torch.bfloat16, torch.device("cpu"), CpuKernels(1))
    perturbation = LowRank(model, weights, 2)
    perturbation.set(MEMBERS, SIGMA)
    name = "model.layers.0.mlp.up_proj.weight"
    drawn, shape = perturbation.block.matrices[name], tuple(weights.base[name].shape)
    for i, member in enumerate(MEMBERS):
        a, b = definition.factors(member.seed, weights.ids[name], shape, 2)
        scaled = np.float32(SIGMA / math.sqrt(2) * member.sign) * a
        assert torch.equal(drawn.a[i], torch.from_numpy(scaled).bfloat16())
        assert torch.equal(drawn.b[i], torch.from_numpy(b).bfloat16())


@pytest.mark.parametrize("rank", [1, 4])
def test_noise_of_a_matrix_has_mean_0_and_variance_1(rank):
    """Over seeds, not within a matrix: its elements share factors."""
    noise = []
    for seed in range(2000):
        a, b = definition.factors(seed, 7, (5, 6), rank)
        noise.append(a.T @ b / math.sqrt(rank))
    noise = np.array(noise)
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    # The variance of E^2 is 2 + 6 / rank: a product of normals has heavy tails.
    assert abs((noise**2).mean() - 1) < 5 * math.sqrt((2 + 6 / rank) / noise.size)


def materialise(weights: Weights, member: Member, rank: int) -> None:
    """The member's own weights as live weights, by the definition."""
    weights.show(materialised(weights, member, rank))


def materialised(weights: Weights, member: Member, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, base in weights.base.items():
        number, values = weights.ids[name], base.numpy()
        if values.ndim == 2:
            a, b = definition.factors(member.seed, number, values.shape, rank)
            noise = a.T @ b / np.sqrt(rank)
        else:
            noise = definition.normal(member.seed, number, 0, values.size)
        yield name, torch.from_numpy(values + SIGMA * member.sign * noise.reshape(values.shape))


FLOAT32, BFLOAT16 = (torch.float32, 1e-4), (torch.bfloat16, 0.25)


@pytest.mark.parametrize("dtype, tolerance", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "kind, tied", [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("gpt2", True)]
)
def test_a_block_computes_what_materialised_members_compute(tiny_model, kind, tied, rank, dtype, tolerance):
    if kind == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model, _ = loading.load(str(tiny_model(kind=kind, tied=tied)), allow_download=False)
    weights = take_over(model, dtype, torch.device("cpu"), CpuKernels(1), rank)
    digest = weights.digest()
    perturbation = LowRank(model, weights, rank)
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(ids).logits.float()
        perturbation.set(MEMBERS, SIGMA)
        perturbation.rows(torch.arange(len(MEMBERS)).repeat_interleave(len(ids)))
        block = model(ids.repeat(len(MEMBERS), 1)).logits.float().view(len(MEMBERS), *plain.shape)
        perturbation.clear()
        assert torch.equal(model(ids).logits.float(), plain), "nothing is left of the block"
        for member, logits in zip(MEMBERS, block, strict=True):
            materialise(weights, member, rank)
            expected = model(ids).logits.float()
            assert (expected - plain).abs().max() > 0.1, "the perturbation is large enough to be seen"
            assert (logits - expected).norm() < 0.2 * (expected - plain).norm()
            torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    assert weights.digest() == digest


def test_a_block_generates_what_its_members_generate_alone(tiny_model):
    model, tokenizer = loading.load(str(tiny_model(kind="llama", tied=True)), allow_download=False)
    weights = take_over(model, torch.float32, torch.device("cpu"), CpuKernels(1), 1)
    perturbation = LowRank(model, weights, 1)
    text = Text(model, tokenizer, chat_template=True)
    engine = HfEngine(model, text, max_new_tokens=12, batch_size=6, on_rows=perturbation.rows)
    text.stops = set(range(0, 99, 7))  # so that rows leave the batch one after another
    prompts = ["2 + 2 =", "Say something short.", "?"]
    perturbation.set(MEMBERS, SIGMA)
    together = engine.generate_block(prompts, len(MEMBERS))
    perturbation.clear()
    for member, answers in zip(MEMBERS, together, strict=True):
        materialise(weights, member, 1)
        assert engine.generate(prompts) == answers
    assert len({tuple(answers.texts) for answers in together}) == len(MEMBERS)
    assert len({tokens for answers in together for tokens in answers.tokens}) > 2


def test_update_reaches_the_live_weights_of_the_next_block(tiny_model):
    model, _ = loading.load(str(tiny_model(kind="llama", tied=True)), allow_download=False)
    weights = take_over(model, torch.float32, torch.device("cpu"), CpuKernels(1), 1)
    perturbation = LowRank(model, weights, 1)
    perturbation.set(MEMBERS, SIGMA)
    weights.update(np.array([1], dtype=np.uint64), np.array([0.1], dtype=np.float32))
    perturbation.set(MEMBERS, SIGMA)
    for name, base in weights.base.items():
        assert torch.equal(weights.live[name], base)


def test_a_stack_of_matrices_has_factors_for_each():
    base = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    seeds, coefficients = np.array([7, 2**63 + 1], np.uint64), np.array([0.5, -0.25], np.float32)
    weights = take_over(Stacked(base), torch.float32, torch.device("cpu"), CpuKernels(1), 2)
    weights.update(seeds, coefficients)
    for matrix, found in enumerate(weights.base["stack"]):
        expected = definition.lowrank_updated(
            base[matrix], seeds, coefficients, weights.ids["stack"], 2, matrix
        )
        assert torch.equal(found, torch.from_numpy(expected))
    pairs = [definition.factors(7, weights.ids["stack"], (3, 4), 2, matrix) for matrix in (0, 1)]
    assert not np.array_equal(pairs[0][0], pairs[1][0])
    assert not np.array_equal(pairs[0][1], pairs[1][1])


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lowrank"])
def test_what_an_update_would_make_is_shown_with_its_bits(rank, master):
    """Of a stack matrix by matrix; of a bfloat16 base after its rounding. The base stays."""
    base = np.arange(3 * 5 * 64, dtype=np.float32).reshape(3, 5, 64) / 97
    seeds, coefficients = np.array([7, 2**63 + 1], np.uint64), np.array([0.5, -0.25], np.float32)
    weights = take_over(Stacked(base), master, torch.device("cpu"), CpuKernels(1), rank, master)
    before = weights.base["stack"].clone()
    weights.show_updated(seeds, coefficients)
    shown = weights.live["stack"].clone()
    assert torch.equal(weights.base["stack"], before)
    weights.update(seeds, coefficients)
    assert torch.equal(weights.base["stack"], shown) and not torch.equal(shown, before)


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lowrank"])
def test_a_stack_whose_base_is_bfloat16_is_widened_matrix_by_matrix(rank, monkeypatch):
    """With the bits that it would have as a whole."""
    base = np.linspace(-1, 1, 5 * 40 * 30, dtype=np.float32).reshape(5, 40, 30)
    seeds, coefficients = np.array([7, 8], np.uint64), np.array([0.5, -0.25], np.float32)
    found = []
    for whole in (False, True):
        cpu, kernels = torch.device("cpu"), CpuKernels(1)
        weights = take_over(Stacked(base), torch.bfloat16, cpu, kernels, rank, torch.bfloat16)
        if whole:
            monkeypatch.setattr("mpies.model.weights._parts_of", lambda base: [(base, 0)])
        weights.update(seeds, coefficients)
        weights.perturb(9, 0.1)
        found.append((weights.base["stack"], weights.live["stack"], weights.digest()))
    assert all(torch.equal(one, other) for one, other in zip(found[0][:2], found[1][:2], strict=True))
    assert found[0][2] == found[1][2]
    assert len(weights.base["stack"].unique()) > 1000


@pytest.mark.parametrize(
    "shape, matrices",
    [((3, 4), 1), ((1, 4), 1), ((5, 3, 4), 5), ((5, 1, 4), 0), ((5,), 0), ((2, 3, 4, 5), 0)],
)
def test_what_is_a_matrix_or_several(shape, matrices):
    assert definition.matrices_in(shape) == matrices
    factors = matrices * 2 * sum(shape[-2:]) or math.prod(shape)
    assert lowrank.count_noise([torch.Size(shape)], 2) == factors


class Stacked(torch.nn.Module):
    def __init__(self, values: np.ndarray):
        super().__init__()
        self.stack = torch.nn.Parameter(torch.from_numpy(values))
        self.config = PreTrainedConfig()
