"""Positions that depend on the longest row of a batch: refused where they would, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import zoo
from transformers import PreTrainedModel

from mpies.engines import likelihood
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.errors import InputError

REACH = 24
NEW = 4
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 6.0, 8.0],
}
SHORT = {"max_position_embeddings": REACH}

# An architecture, and the settings with which rows depend on one another beyond REACH tokens.
DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, **SHORT}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            "layer_types": ["sliding_attention", "full_attention"],
            **SHORT,
        },
    ),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": REACH}),
    "Llama 4's temperature": (
        "llama4_text",
        {"attn_temperature_tuning": True, "floor_scale": REACH + 1, "no_rope_layers": [1, 0]},
    ),
    "longrope of another": ("llama", {"rope_parameters": LONG | {"original_max_position_embeddings": REACH}}),
}
INDEPENDENT: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": PLAIN},
    "linear": {"rope_parameters": PLAIN | {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_parameters": PLAIN | {"rope_type": "yarn", "factor": 4.0}},
    "llama3": {
        "rope_parameters": PLAIN
        | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": REACH}
    },
}
dependent = pytest.mark.parametrize("kind", DEPENDENT)


def model_of(kind: str) -> PreTrainedModel:
    name, changes = DEPENDENT[kind]
    return zoo.build(name, **changes)


def engine_of(model: PreTrainedModel) -> HfEngine:
    text = Text(model, tiny.tokenizer(), chat_template=False)
    return HfEngine(model, text, max_new_tokens=NEW, batch_size=8)


def read(model: PreTrainedModel, *lengths: int) -> np.ndarray:
    """Log-probabilities of an answer to a prompt of 3 tokens, beside prompts of other lengths."""
    prompts = [[5, 6, 7], *(list(range(8, 8 + length)) for length in lengths)]
    return likelihood.of(model, prompts, [[30, 40, 50, 60]] * len(prompts))[0]


@dependent
def test_beyond_its_reach_a_row_depends_on_the_longest(kind):
    """Otherwise there would be nothing to refuse; and up to there, nothing is to be refused."""
    model = model_of(kind)
    alone = read(model)
    np.testing.assert_allclose(read(model, REACH - NEW), alone, atol=1e-4)
    assert np.abs(read(model, REACH + NEW) - alone).max() > 1e-3


@dependent
def test_answers_up_to_the_reach_are_independent_and_beyond_are_refused(kind):
    model = model_of(kind)
    engine = engine_of(model)
    longest, short = "x" * (REACH - NEW), "3 + 5 ="
    together = engine.generate([short, longest])
    assert together.ids == [engine.generate([prompt]).ids[0] for prompt in (short, longest)]
    with pytest.raises(InputError) as refused:
        engine.generate([short, longest + "xx"])
    assert str(refused.value) == (
        f"engine.max_new_tokens: the longest prompt and its answer may have {REACH + 2} tokens, but beyond"
        f" {REACH} what {type(model).__name__} computes for a row depends on the longest row of a batch;"
        " use 2 less, or engine.name=vllm"
    )


@dependent
def test_answers_that_are_read_beyond_are_refused_as_well(kind):
    engine = engine_of(model_of(kind))
    prompts = ["3 + 5 =", "x" * (REACH - NEW)]
    engine.log_probabilities(prompts, [[30], [40] * NEW])
    with pytest.raises(InputError, match=f"may have {REACH + 1} tokens, but beyond {REACH}"):
        engine.log_probabilities(prompts, [[30], [40] * (NEW + 1)])


@pytest.mark.parametrize("changes", INDEPENDENT.values(), ids=INDEPENDENT)
def test_frequencies_that_stay_are_never_refused(changes):
    model = zoo.build("llama", **changes, **SHORT)
    assert len(engine_of(model).generate(["3 + 5 =", "x" * 2 * REACH]).ids) == 2
    np.testing.assert_allclose(read(model, 2 * REACH), read(model), atol=1e-4)


@pytest.mark.parametrize("kind", [*DEPENDENT, "learned"])
def test_a_long_prompt_beside_a_long_answer_changes_nothing(kind):
    """Each row is within reach; the longest prompt with the longest answer is not."""
    model = zoo.build("gpt2", max_position_embeddings=REACH) if kind == "learned" else model_of(kind)
    engine = engine_of(model)
    prompts, answers = ["a" * 17, "b", "ab"], [[5, 9], [9, 11] * 10, [7, 8]]
    assert [len(engine.text.encode(prompt)) for prompt in prompts] == [17, 1, 2]
    for after in (None, [1, 2, 0]):
        together = engine.log_probabilities(prompts, answers, after=after)
        for i, found in enumerate(together):
            one = engine.log_probabilities(prompts[i : i + 1], answers[i : i + 1])[0]
            assert found == pytest.approx(one[after[i] if after else 0 :], abs=1e-5)
