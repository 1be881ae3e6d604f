"""Mixtures of experts and hybrids in vLLM: a member has the same experts, routers and states as with hf."""

from __future__ import annotations

import one_vllm
import pytest
import torch
import vllm_zoo

from mpies import config, replica
from mpies.engines.vllm.mapping import Made
from mpies.errors import InputError
from mpies.replica import Replica
from mpies.tasks.base import Task

PROMPTS = ["Solve: 3 + 5 =", "a", "2,4,6,8," * 20]
# Experts in a stack; others' names in checkpoints, and experts one by one; a hybrid with experts, whose rates
# of states vLLM makes of their logarithms. More of the same: routers with biases, other fused matrices.
QUICK = ["qwen3_moe", "mixtral", "granitemoehybrid"]
OTHERS = ["olmoe", "qwen2_moe", "granitemoe", "falcon_h1"]


def build(world, folder, engine: str, *others: str) -> Replica:
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += ["task.chat_template=false", "engine.max_new_tokens=10", "engine.batch_size=3"]
    given += [f"engine.name={engine}", "es.perturbation=full", "task.name=conciseness", *others]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    settings = config.load(given)
    if engine == "vllm":
        return one_vllm.alone(lambda: replica.build(world, settings, task))
    return replica.build(world, settings, task)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_member_is_the_same_in_both_engines(world, tmp_path, name):
    folder = vllm_zoo.save(name, tmp_path)
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


def test_what_vllm_has_made_of_other_weights_is_found_at_start(world, tmp_path, monkeypatch):
    """States' rates that stay those of the base."""
    plain, seen = Made.remake, []
    monkeypatch.setattr(Made, "remake", lambda self: seen.append(self) or len(seen) > 2 or plain(self))
    with pytest.raises(
        InputError, match=r"^engine\.name: vllm computes Granite.* once its weights are perturb"
    ):
        build(world, vllm_zoo.save("granitemoehybrid", tmp_path), "vllm")


def test_low_rank_is_refused_by_name(world, tmp_path):
    with pytest.raises(InputError, match=r"does not know vLLM's GateLinear at model\.layers\.0"):
        build(world, vllm_zoo.save("qwen3_moe", tmp_path), "vllm", "es.perturbation=lowrank")
