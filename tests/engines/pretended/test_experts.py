"""Mixtures of experts on a pretended GPU: one device at a time, the CPU's tokens, and few waits."""

from __future__ import annotations

import pytest
import tiny
import torch
import zoo
from pretended_gpu import DEVICE, Counted, counting

from mpies.engines import selftest
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Population
from mpies.model.lowrank import LowRank
from mpies.model.weights import Weights, take_over
from mpies.noise.cpu import CpuKernels
from mpies.noise.gpu import GpuKernels

CPU = torch.device("cpu")
PROMPTS = ["ab", "efghij"]
MEMBERS = Population(2, seed=1).members(0)


class Rank:
    """A model of that architecture, with low-rank noise."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32):
        self.model = zoo.build(name)
        kernels = CpuKernels(1) if device == CPU else GpuKernels()
        self.weights: Weights = take_over(self.model, dtype, device, kernels, 1)
        self.perturbation = LowRank(self.model, self.weights, 1)

    def engine(self, tokens: int) -> HfEngine:
        text = Text(self.model, tiny.tokenizer(), chat_template=False)
        text.stops = {10**6}
        rows = self.perturbation.rows
        return HfEngine(self.model, text, max_new_tokens=tokens, batch_size=64, on_rows=rows)

    def start(self) -> None:
        """Find how modules that low rank does not know compute with members, and that all is right."""
        selftest.check(self.model, self.weights, self.perturbation, self.engine(3))

    def answers(self, tokens: int = 3) -> list[list[list[int]]]:
        self.perturbation.set(MEMBERS, 0.05)
        return [made.ids for made in self.engine(tokens).generate_block(PROMPTS, len(MEMBERS))]


# Experts of transformers' interface, with biases, the other way round; stacks that go member by member.
@pytest.mark.parametrize("name, in_turns", [("gpt_oss", 0), ("longcat_flash", 1)])
def test_the_same_is_computed(name, in_turns):
    made = []
    for device in (CPU, DEVICE):
        with counting():
            rank = Rank(name, device)
            assert {parameter.dim() for parameter in rank.weights.base.values()} == {1, 2, 3}
            made.append(rank.answers())
            assert len(rank.perturbation.ways.in_turns()) == in_turns
    assert made[0] == made[1]
    assert made[0][0] != made[0][1], "members answer differently"


def test_in_bfloat16_experts_are_one_product():
    """torch's product of groups, which only GPUs take here: members compute what their own weights say."""
    with counting() as counted:
        Rank("qwen3_moe", DEVICE, torch.bfloat16).start()
    assert counted.operations["_grouped_mm"]


def cost(rank: Rank, tokens: int) -> Counted:
    with counting() as counted:
        rank.answers(tokens)
    return counted


def test_a_token_waits_for_no_expert():
    """As without experts: have all rows ended; and, in transformers, is one of them padded?"""
    with counting():
        rank = Rank("qwen3_moe", DEVICE, torch.bfloat16)
        rank.answers()
    waits = cost(rank, 3).waits - cost(rank, 2).waits
    assert sum(waits.values()) == 2, waits
