"""What vLLM's layers add on GPUs, as torch.compile sees it: here without a GPU and without vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from mpies.engines.vllm import noise
from mpies.engines.vllm.members import Members
from mpies.model import lowrank_block, lowrank_cpu

TOKENS, SIZES = 4, [16, 8, 8]


@pytest.fixture
def on_gpus(monkeypatch):
    """The kernels for GPUs, in Triton's interpreter, in place of those for CPUs."""
    monkeypatch.setattr(lowrank_block, "FUSED_ON", {"cpu"})
    monkeypatch.setattr(lowrank_cpu, "knows", lambda tensor: False)
    members = Members(3, 8, torch.device("cpu"))
    members.assign([2, 0, 1], np.array([1, 2, 1]))
    return members.tokens


def matrix() -> noise.MatrixNoise:
    torch.manual_seed(0)
    made = noise.MatrixNoise(torch.zeros(sum(SIZES), 20), SIZES, 3, 2)
    made.a[:3].normal_()
    made.b[:3].normal_()
    return made


def test_a_graph_holds_one_operation_for_each(on_gpus):
    """Nothing breaks the graph, and nothing is looked into; what is computed is what is computed without."""
    made, vectors = matrix(), torch.randn(4, 20)
    x, ids = torch.randn(TOKENS, 20), torch.tensor([3, 0, 7, 7])

    def layer(x, ids):
        x = made.look_up(x + 1, ids, on_gpus)
        normed, x = noise.rms_norm(x, x * 2, vectors, on_gpus, 1e-5, False)
        return made.add(normed @ torch.ones(20, sum(SIZES)), x, on_gpus, lowrank_cpu.at_once)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = layer(x, ids)
    found = torch.compile(layer, backend=backend, fullgraph=True)(x, ids)
    assert torch.equal(found, expected)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, ids), expected)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sorted(name for name in called if "mpies" in name) == [
        "mpies.add_and_norm",
        "mpies.add_looked_up",
        "mpies.add_products",
    ]
