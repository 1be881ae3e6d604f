"""Mixtures of experts in vLLM: with each member's own experts and routers, as in the hf engine."""

from __future__ import annotations

import one_vllm
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mpies import config, replica
from mpies.errors import InputError
from mpies.replica import Replica
from mpies.tasks.base import Task

PROMPTS = ["Solve: 3 + 5 =", "a", "2,4,6,8," * 20]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def save(folder):
    text = tiny.tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=len(text), **SHAPE))
    model.float().save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def build(world, folder, engine: str, perturbation: str = "full") -> Replica:
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["task.chat_template=false", "engine.max_new_tokens=10", "engine.batch_size=3"]
    given += [f"engine.name={engine}", f"es.perturbation={perturbation}", "task.name=conciseness"]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    settings = config.load(given)
    if engine == "vllm":
        return one_vllm.alone(lambda: replica.build(world, settings, task))
    return replica.build(world, settings, task)


def test_a_member_is_the_same_mixture_in_both_engines(world, tmp_path):
    folder = save(tmp_path)
    both = [build(world, folder, engine) for engine in ("vllm", "hf")]
    answers = []
    for seed in (1, 2):
        for made in both:
            made.weights.perturb(seed, 0.05)
        mine, theirs = (made.engine.generate(PROMPTS) for made in both)
        assert mine == theirs
        answers.append(mine.ids)
    assert answers[0] != answers[1]
    assert both[0].weights.digest() == both[1].weights.digest()


def test_low_rank_is_refused_by_name(world, tmp_path):
    with pytest.raises(InputError, match=r"does not know vLLM's GateLinear at model\.layers\.0"):
        build(world, save(tmp_path), "vllm", "lowrank")
