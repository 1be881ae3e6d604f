"""The output layer is one product for all rows of a prefill."""

from __future__ import annotations

from collections import Counter

import pytest
import small
import torch

from mpies.engines.decode import decode
from mpies.es.population import Member
from mpies.model import loading
from mpies.model.output_layer import close_gaps

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


def products(model, prompts: list[list[int]]) -> tuple[list[list[int]], Counter]:
    """Two tokens of answer to each prompt, and how many products of a kind the vocabulary's rows are in."""
    with torch.profiler.profile(record_shapes=True) as seen:
        answers = decode(model, prompts, set(), 2, lambda rows: None)
    rows = model.config.vocab_size
    kinds = [
        event.name
        for event in seen.events()
        if event.name in ("aten::mm", "aten::bmm") and event.input_shapes[1][-1:] == [rows]
    ]
    return answers, Counter(kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_linear_layer_makes_one_product(tiny_model, dtype):
    """As on a GPU, where nothing is in its place. Of a tensor with gaps, it makes a batch of products up to
    torch 2.13: the module can go with these."""
    model, _ = loading.load(str(tiny_model()), allow_download=False)
    model.to(dtype).requires_grad_(False)
    with_gaps, found = products(model, PROMPTS)
    learned = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    assert found == ({"aten::mm": 2} if learned else {"aten::bmm": 1, "aten::mm": 1})
    close_gaps(model)
    assert products(model, PROMPTS) == (with_gaps, {"aten::mm": 2})


@pytest.mark.parametrize("perturbation", ["full", "lowrank"])
def test_the_output_layer_of_a_replica_gets_rows_without_gaps(alone, tiny_model, tmp_path, perturbation):
    given: list[torch.Tensor] = []
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        replica = runs.build(es__perturbation=perturbation)
        layer = replica.model.get_output_embeddings()
        plain = layer.forward
        layer.forward = lambda x: (given.append(x), plain(x))[1]
        replica.perturbation.set([Member(0, 7, 1)], 0.01)
        replica.engine.generate(["3 + 5 =", "Say it.", "What is this?"])
    assert {x.shape[:2] for x in given} == {(3, 1)} and all(x.is_contiguous() for x in given)


def test_a_model_without_an_output_layer_stays_as_it_is():
    close_gaps(torch.nn.Linear(2, 3))
