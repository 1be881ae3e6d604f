"""Experts with a block of members: every expert a matrix, with factors of its own for each member.

transformers keeps the experts of a layer as stacks of matrices and computes all models' by one interface
(`use_experts_implementation`), which tells of a module how its experts are: with a gate, with biases, the
other way round. By it one function serves all of them. Tokens of all members that go to an expert are
multiplied by its matrix together; each adds its own member's noise of that expert. Which experts a token
goes to was chosen by its own member's router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mpies.model.linear_cpu import linear
from mpies.model.lowrank_block import Block, fuses

TOLD = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
PARAMETERS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


def knows(module: nn.Module) -> bool:
    """Is it a stack of experts of transformers' interface, with no norm after them?"""
    told: Any = module
    return (
        all(hasattr(module, name) for name in TOLD)
        and set(module._parameters) <= PARAMETERS
        and not getattr(told, "has_post_expert_norm", False)
        and not getattr(told, "_is_expert_parallel", False)
    )


def mixed(
    block: Block,
    module: nn.Module,
    names: Mapping[str, str],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What the experts make of tokens x (T, K): sum_j weights[t, j] expert(chosen[t, j], x[t]), (T, K).

    chosen int64 (T, J), weights (T, J). `names`: of the module's parameters, to those of the noise.
    """
    told: Any = module
    each = chosen.shape[-1]
    numbers, order = torch.sort(chosen.reshape(-1), stable=True)  # of an expert, one after another
    tokens = order // each
    pairs = Pairs(block, module, names, numbers, block.members_of(len(x))[tokens])
    inner = pairs.product(x[tokens], "gate_up_proj" if told.has_gate else "up_proj")
    inner = told._apply_gate(inner) if told.has_gate else told.act_fn(inner)
    made = pairs.product(inner, "down_proj") * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return made[back].view(len(x), each, -1).sum(dim=1).to(x.dtype)


class Pairs:
    """Tokens, each with the expert that it goes to, in the order of experts."""

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        names: Mapping[str, str],
        numbers: torch.Tensor,
        members: torch.Tensor,
    ):
        self.block, self.module, self.names = block, module, names
        self.numbers, self.members = numbers, members
        count: int = module.num_experts  # type: ignore[assignment]
        self.chosen = members * count + numbers
        # Counting them would wait for a GPU.
        self.ends = torch.searchsorted(numbers, torch.arange(count, device=numbers.device), right=True)

    def product(self, x: torch.Tensor, key: str) -> torch.Tensor:
        """Each token (S, K) times its expert's matrix of that name, and its bias: (S, N)."""
        stack = self.module._parameters[key]
        assert stack is not None
        turned = bool(self.module.is_transposed)
        y = _grouped(x, stack if turned else stack.mT, self.ends)
        noise = self.block.matrices[self.names[key]].each
        self.block.add_chosen(y, x, noise.turned() if turned else noise, self.chosen)
        bias = f"{key}_bias"
        if bias in self.names:  # the biases of all experts are a matrix, whose noise has factors
            shared = self.module._parameters[bias]
            factors = self.block.matrices[self.names[bias]]
            assert shared is not None
            a, b = factors.a[self.members, :, self.numbers], factors.b[self.members]
            y += torch.baddbmm(shared[self.numbers].unsqueeze(1), a.unsqueeze(1), b)[:, 0]
        return y


def _grouped(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (S, K), in the order of groups, times each group's matrix of stack (G, K, N): (S, N).

    ends int64 (G,): how many of x are in that group or in those before it.
    """
    if fuses(x) and _knows_groups(x, stack):  # nor does it wait to know how many they are
        return nn.functional.grouped_mm(x, stack, offs=ends.to(torch.int32))
    y = x.new_empty(len(x), stack.shape[-1])
    first = 0
    for number, end in enumerate(ends.tolist()):
        if first < end:
            y[first:end] = linear(x[first:end], stack[number].t())
        first = end
    return y


def _knows_groups(x: torch.Tensor, stack: torch.Tensor) -> bool:
    """Does torch's product of groups take them? Rows begin at multiples of 16 bytes."""
    whole = x.shape[1] % 8 == 0 and stack.shape[2] % 8 == 0
    return hasattr(nn.functional, "grouped_mm") and x.dtype == torch.bfloat16 and whole
