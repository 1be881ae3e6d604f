"""Windows of attention, through which the start's tests are too short to look."""

from __future__ import annotations

import re

import pytest
import test_vllm_lowrank as blocks

from mpies.errors import InputError

WINDOW = 40  # the start tells 16 tokens, the longest prompt has 80


@pytest.mark.parametrize(
    "family, why",
    [
        # transformers' Llama does not read it, vLLM does.
        ("Llama", f"in 2 layers of this model, by {WINDOW} tokens in vllm and at all tokens in"),
        # vLLM adds a token.
        ("Cohere2", f"by {WINDOW + 1} tokens in vllm and by {WINDOW} tokens in transformers"),
    ],
    ids=["setting-that-is-not-read", "one-more"],
)
def test_windows_that_vllm_has_otherwise_are_refused(world, tmp_path, family, why):
    folder = blocks.save(tmp_path, family, sliding_window=WINDOW)
    with pytest.raises(InputError, match=rf"^engine\.name: .*{re.escape(why)}.* may have {WINDOW};"):
        blocks.build(world, folder, "es.perturbation=full")


@pytest.mark.slow
def test_windows_that_nothing_reaches_beyond_are_none(world, tmp_path):
    folder = blocks.save(tmp_path, "Llama", sliding_window=100)
    blocks.build(world, folder, "es.perturbation=full")


def test_members_look_through_the_windows_that_transformers_has(world, tmp_path):
    folder = blocks.save(tmp_path, "Mistral", sliding_window=WINDOW)
    blocks.test_members_answer_as_their_own_weights_do(blocks.build(world, folder))


def test_answers_go_beyond_where_rows_depend_on_the_longest_in_transformers_alone(world, tmp_path):
    """What is given to be read does not: transformers reads some of it."""
    reach, factors = 60, {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    stretched = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    stretched["original_max_position_embeddings"] = reach
    changes = {"rope_parameters": stretched, "original_max_position_embeddings": reach}
    folder = blocks.save(tmp_path, "Phi3", **changes)
    engine = blocks.build(world, folder, "es.perturbation=full").engine
    assert engine.most_given == reach < engine.most_tokens
    assert all(engine.generate(blocks.PROMPTS).ids)
