"""Noise belongs to a parameter's name and its elements' places: both are the same in transformers' versions.

`tests/data/parameter_names.json` has a digest of each architecture's, as transformers 5.23 has them; the
oldest version that is allowed is held to it by `make test-oldest`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from transformers import AutoModelForCausalLM

PINNED = json.loads((Path(__file__).parents[1] / "data" / "parameter_names.json").read_text())
# Between 5.4 and 5.23, these were given other names or shapes: one version does not replay another's runs.
CHANGED = {"gemma3", "gemma3n_text", "gpt_neox", "granitemoe", "granitemoehybrid", "granitemoeshared"}
CHANGED |= {"aria_text", "glm_moe_dsa", "olmo_hybrid", "longcat_flash"}  # the latter's sizes had other names
QUICK = {"llama", "qwen2", "qwen3_moe", "qwen3_5_text", "gpt_oss"}

before = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
compared = sorted(set(PINNED) - set(zoo.missing()) - (CHANGED if before else set()))


def digest(name: str) -> str:
    """Of the names and shapes of an architecture's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(zoo.configuration(name))
    told = sorted(f"{key} {tuple(value.shape)}" for key, value in model.named_parameters())
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def test_all_architectures_are_pinned():
    assert set(PINNED) == set(zoo.ARCHITECTURES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in compared]
)
def test_names_and_shapes_are_those_of_other_versions(name):
    assert digest(name) == PINNED[name]
