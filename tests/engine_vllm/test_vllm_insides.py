"""The canary: vLLM's private names that mpies uses are there, and what is not is told by name."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from mpies.engines.vllm import host, insides
from mpies.engines.vllm.insides import INSIDES, OF_MODELS, Inside
from mpies.errors import InputError


@pytest.mark.parametrize("inside", [*INSIDES, *OF_MODELS], ids=lambda inside: inside.name)
def test_all_are_there(inside):
    assert inside.problem() is None


def test_memory_is_bound_by_what_is_replaced():
    from vllm import _custom_ops  # noqa: F401  brings vLLM's own operations

    assert hasattr(torch.ops._C, "init_cpu_memory_env")


@pytest.mark.parametrize(
    "inside, problem",
    [
        (Inside("v1.gone", "Name"), "there is no vllm.v1.gone.Name"),
        (Inside("_custom_ops", "gone"), "there is no vllm._custom_ops.gone"),
        (
            Inside("_custom_ops", "onednn_mm", ("x", "bias")),
            "vllm._custom_ops.onednn_mm takes dnnl_handler, x",
        ),
    ],
)
def test_what_changed_is_named(inside, problem):
    assert inside.problem().startswith(problem)


def test_a_changed_vllm_is_refused_when_it_starts(monkeypatch, tiny_model):
    """In one line, with all that is not as it was."""
    monkeypatch.delattr(UniProcExecutor, "_distributed_args")
    monkeypatch.setattr(insides, "VARIABLES", (*insides.VARIABLES, "VLLM_GONE"))
    room, folder = host.Room(2, 32), str(tiny_model(kind="llama", hidden=128))
    with pytest.raises(InputError) as refused:
        host.start(folder, torch.float32, torch.device("cpu"), room, 2**24, 0, host.Packing())
    problems = "there is no vllm.v1.executor.uniproc_executor.UniProcExecutor._distributed_args"
    assert f"{problems}; it does not know VLLM_GONE; or use engine.name=hf" in str(refused.value)
