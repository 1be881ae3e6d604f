"""vLLM's parameters are looked through on the CPU: on a GPU, each look would have to be waited for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pretended_gpu import DEVICE, counting
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mpies.engines.vllm import mapping

LAYERS, SIZE = 5, 4
SMALL = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 2)
PARTS = "qkv"


class Fused(nn.Module):
    """As vLLM has a layer: q, k and v are one matrix, below one another."""

    def __init__(self):
        super().__init__()
        for layer in range(LAYERS):
            for name, shape in (("qkv", (len(PARTS) * SIZE, SIZE)), ("norm", (SIZE,))):
                room = torch.empty(shape, device=DEVICE)
                self.register_parameter(f"{name}{layer}", nn.Parameter(room, requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            layer, part = name.split(".")
            first = SIZE * PARTS.find(part)
            fused = self.get_parameter(f"norm{layer}" if part == "norm" else f"qkv{layer}").data
            (fused if part == "norm" else fused[first : first + SIZE]).copy_(value)


def test_a_look_at_vllms_parameters_waits_once_for_each():
    """Twice for the numbers that tell whose its rows are, and once to compare each of the model's own."""
    with counting():
        model = Fused()
        base = {
            f"{layer}.{part}": torch.randn((SIZE,) if part == "norm" else (SIZE, SIZE), device=DEVICE)
            for layer in range(LAYERS)
            for part in (*PARTS, "norm")
        }
    theirs = LlamaForCausalLM(LlamaConfig(**SMALL))  # a checkpoint has the names and pieces that it has
    with counting() as counted:
        views = mapping.find_views(model, base, torch.float32, theirs, DEVICE).live
    assert sum(counted.waits.values()) == 2 * 2 * LAYERS + len(base), counted.waits
    with counting():
        assert all(torch.equal(views[name], base[name]) for name in base)
        model.get_parameter("qkv0").data.zero_()
        assert not views["0.k"].cpu().any() and views["1.k"].cpu().any(), "they are views"
