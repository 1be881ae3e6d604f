"""vLLM on a GPU, with kernels that do not depend on the batch: members are the same, whatever is beside them.

Not collected without a GPU. Heads of 64 numbers, and bfloat16: vLLM's attention on GPUs is made for these.
"""

from __future__ import annotations

import pytest
import torch
from test_vllm_lowrank import MEMBERS, PROMPTS, SIGMA, build, save

pytestmark = pytest.mark.gpu

GIVEN = ["model.device=cuda", "model.dtype=bfloat16", "engine.batch_invariant=true"]
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
TOKENS, LIKELIEST = 10, 20


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), request.param, **SHAPE)


def told(made, prompts: list[str], members: int) -> list[list[tuple]]:
    """Of each member: each prompt's answer, and every log-probability that vLLM tells, bit for bit."""
    found = made.engine.tell(
        [made.engine.text.encode(prompt) for prompt in prompts], members, TOKENS, LIKELIEST
    )
    answers = [(tuple(one.answer), tuple(tuple(sorted(p.items())) for p in one.places)) for one in found]
    return [answers[m * len(prompts) : (m + 1) * len(prompts)] for m in range(members)]


def test_members_do_not_depend_on_the_batch(world, folder):
    """Alone, all together, in another order, among other members, and with other sizes of batches."""
    made = build(world, folder, *GIVEN, "engine.batch_size=15")
    made.perturbation.set(MEMBERS, SIGMA)
    together = told(made, PROMPTS, len(MEMBERS))
    assert len({str(member) for member in together}) == len(MEMBERS)
    backwards = told(made, PROMPTS[::-1], len(MEMBERS))
    assert [member[::-1] for member in backwards] == together
    made.perturbation.set(MEMBERS[::-1], SIGMA)
    assert told(made, PROMPTS, len(MEMBERS))[::-1] == together
    for number, member in enumerate(MEMBERS):
        made.perturbation.set([member], SIGMA)
        alone = [told(made, [prompt], 1)[0][0] for prompt in PROMPTS]
        assert alone == together[number]
    del made
    few = build(world, folder, *GIVEN, "engine.batch_size=2")
    few.perturbation.set(MEMBERS, SIGMA)
    assert told(few, PROMPTS, len(MEMBERS)) == together


def test_members_are_what_their_own_weights_compute(world, folder):
    """That it starts says so: the test at every start compares the log-probabilities of both."""
    from vllm import envs

    made = build(world, folder, *GIVEN)
    assert envs.VLLM_BATCH_INVARIANT and torch.cuda.is_available()
    # Steps are prepared while others run, as vLLM has it on GPUs alone.
    assert made.engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    first = made.engine.generate(PROMPTS).ids
    made.perturbation.set(MEMBERS, 3.0)
    assert all(one.ids != first for one in made.engine.generate_block(PROMPTS, len(MEMBERS)))
    made.perturbation.clear()
    assert made.engine.generate(PROMPTS).ids == first
