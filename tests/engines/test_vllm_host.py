"""How a vLLM is started for a rank, as far as it shows without vLLM; with it: tests/engine_vllm."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mpies.engines.vllm import host
from mpies.engines.vllm.host import Host, Room
from mpies.engines.vllm.packing import Packing
from mpies.errors import InputError

GB = 10**9


def test_gpus_have_slack_for_what_others_take_meanwhile():
    """vLLM refuses to start if its share of all memory is not free when it looks."""
    share = host.options_on_gpus(60 * GB, 80 * GB, rows=64)["gpu_memory_utilization"]
    assert share * 80 * GB <= 60 * GB - 5 * GB


@pytest.mark.parametrize("rows, captured", [(1, None), (512, None), (513, 528), (1024, 1024), (10**5, 2048)])
def test_graphs_are_captured_for_all_answers_at_a_time(rows, captured):
    options = host.options_on_gpus(60 * GB, 80 * GB, rows)
    assert options.get("compilation_config", {}).get("max_cudagraph_capture_size") == captured


def settings_of_a_start(monkeypatch) -> dict[str, str]:
    """The environment after a start, which fails: vLLM is not installed here."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(InputError, match=r"^engine\.name: vllm does not start"):
        host.start("folder", torch.bfloat16, torch.device("cpu"), Room(1, 9), GB, 0, Packing())
    return dict(os.environ)


@pytest.mark.skipif(bool(find_spec("vllm")), reason="vLLM is installed")
def test_nothing_is_compiled_by_nvcc(monkeypatch):
    """Which a wheel of vLLM comes without: FlashInfer's sampler would be, at the start."""
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    assert settings_of_a_start(monkeypatch)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert settings_of_a_start(monkeypatch)["VLLM_USE_FLASHINFER_SAMPLER"] == "1", "what is set stays"


@pytest.mark.skipif(bool(find_spec("vllm")), reason="vLLM is installed")
def test_the_cache_is_not_taken_from_the_environment(monkeypatch):
    """On CPUs, vLLM's old variable would count in place of the bytes that were reckoned."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert "VLLM_CPU_KVCACHE_SPACE" not in settings_of_a_start(monkeypatch)


def test_what_vllm_does_not_know_is_refused_before_it_starts():
    """It knows a model stretched by YaRN up to the configuration's own number, where hf knows more."""
    config = LlamaConfig(max_position_embeddings=512, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    Host("folder", config, Room(1, 512), torch.bfloat16, torch.device("cpu"), GB, 0)
    with pytest.raises(InputError, match=r"vLLM knows places up to 512 .* use 88 less, or engine.name=hf$"):
        Host("folder", config, Room(1, 600), torch.bfloat16, torch.device("cpu"), GB, 0)


@pytest.mark.skipif(bool(find_spec("vllm")), reason="vLLM is installed")
@pytest.mark.parametrize(
    "device, master, scratch",
    [
        ("cuda", torch.float32, 4 * (3000 + 2000)),  # model.base=host: two buffers
        ("cuda", torch.bfloat16, 2 * (3000 + 2000) + 4 * 3000),  # and a parameter in float32
        ("cpu", torch.bfloat16, 4 * 3000),  # where it was read before
        ("cpu", torch.float32, 0),  # it is worked on in its place
    ],
)
def test_what_the_base_is_worked_on_in_is_no_room_for_the_cache(device, master, scratch):
    """Where memory is short, the cache takes all that is left."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    base = {str(size): torch.zeros(size, dtype=master) for size in (1000, 2000, 3000, 500)}
    kept = 6500 * master.itemsize if device == "cpu" else 0
    live = 6500 * 2 * (2 if device == "cpu" else 1)
    left = Room(9, 500).bytes(config, torch.bfloat16)
    free = kept + live + host.RESERVE[device] + left
    made = Host("folder", config, Room(100, 500), torch.bfloat16, torch.device(device), free, 0)
    with pytest.raises(InputError, match="vllm does not start"):
        made.hold(LlamaForCausalLM(config), base)
    assert made.cache == left - scratch


def test_a_cache_that_is_small_is_told():
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    made = Host("folder", config, Room(32, 500), torch.bfloat16, torch.device("cuda"), GB, 0)
    made.cache = made.room.bytes(config, torch.bfloat16)
    assert made.tell_room() == ""
    made.cache = made.room.bytes(config, torch.bfloat16, 7) + 1000
    assert made.tell_room() == "vllm, 7 of engine.batch_size=32 answers at a time: memory is short"


@pytest.mark.skipif(not hasattr(LlamaConfig, "per_layer_config"), reason="transformers has no such models")
def test_layers_may_differ():
    """In Gemma 4, those that see all have wider heads; asking the whole configuration raises there."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    plain = Room(1, 100).bytes(LlamaConfig(**shape), torch.bfloat16)
    wider = LlamaConfig(**shape, per_layer_config={1: {"head_dim": 32}})
    assert Room(1, 100).bytes(wider, torch.bfloat16) == plain * 3 // 2
