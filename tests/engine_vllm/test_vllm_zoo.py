"""docs/models.md says what starts of vLLM with the zoo's architectures come to."""

from __future__ import annotations

import json

import launching
import pytest
import transformers
import zoo

from mpies.engines import vllm

PAGE = launching.REPOSITORY / "docs" / "models-vllm.jsonl"
# Dense ones, mixtures whose names are others in checkpoints, hybrids; what is refused, for each reason.
SOME = [
    "gemma3_text",
    "mistral",
    "mixtral",
    "granitemoe",
    "qwen3_next",
    "jamba",
    "cohere2",
    "smollm3",
    "bloom",
]


def test_what_is_told_is_about_the_zoo():
    versions, *lines = map(json.loads, PAGE.read_text().splitlines())
    told = {name: said for name, _, said in lines}
    assert set(told) <= set(zoo.ARCHITECTURES) and set(told) >= set(SOME)
    assert not {name for name, said in told.items() if said.startswith(("WRONG", "CRASH"))}
    assert versions["vLLM"].startswith(f"{vllm.SUPPORTED[0]}.")


@pytest.mark.slow  # each of them is a start, or two; of all: make models-vllm
def test_starts_come_to_what_is_told():
    versions, *lines = map(json.loads, PAGE.read_text().splitlines())
    if versions != {"vLLM": vllm.version(), "transformers": transformers.__version__}:
        pytest.skip(f"docs/models-vllm.jsonl is of {versions}")
    script = launching.REPOSITORY / "tests" / "helpers" / "vllm_zoo.py"
    ended = launching.python(script, *SOME, timeout=900)
    assert ended.returncode == 0, ended.stderr
    _, *found = map(json.loads, ended.stdout.splitlines())
    assert found == [line for name in SOME for line in lines if line[0] == name]
