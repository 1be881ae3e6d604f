"""Models that read images: in batches and in blocks, they compute what their weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeing
import torch
import zoo
from mpi4py import MPI

from mpies import config, replica
from mpies.engines.image import Image
from mpies.engines.vision import for_rows
from mpies.replica import Replica
from mpies.tasks.base import Task

NEW, SIGMA, MEMBERS = 8, 0.05, zoo.MEMBERS
STOPS = set(range(0, 99, 7))


def asked(*images: bytes, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": Image.of(image, Path())} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


# Of different lengths, one with two images, one with none.
PROMPTS = [
    asked(seeing.picture(24, 16), text="What is it?"),
    asked(seeing.picture(16, 16, 1), seeing.picture(16, 32, 2), text="Which?"),
    asked(text="Say something that is a little longer."),
    asked(seeing.picture(32, 24, 3), text="?"),
]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in seeing.KINDS if name != "qwen2_5_vl"]
kinds = pytest.mark.parametrize("kind", ["qwen2_5_vl", *SLOW])


def build(folder: Path, *overrides: str) -> Replica:
    torch.set_num_threads(1)
    given = [f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "run.directory=none"]
    given += [f"engine.max_new_tokens={NEW}", "engine.batch_size=12", "task.name=conciseness", *overrides]
    task = Task("test", [{"prompt": prompt} for prompt in PROMPTS], [], lambda *_, **__: [])
    made = replica.build(MPI.COMM_WORLD, config.load(given), task)
    made.engine.text.stops = STOPS
    return made


def generated(made: Replica) -> list[list[int]]:
    """Each prompt's answer alone, by transformers' own generation."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([made.engine.text.encode(prompt)])
        given = for_rows(made.engine.text.inputs(prompt), 1, ids.shape[1], made.model)
        found = made.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=sorted(STOPS),
            **given,
        )
        answers.append(found[0, ids.shape[1] :].tolist())
        if hasattr(made.model.base_model, "rope_deltas"):
            made.model.base_model.rope_deltas = None
    return answers


@torch.inference_mode()
def logits(made: Replica, prompt: Any, members: int = 1) -> torch.Tensor:
    ids = torch.tensor([made.engine.text.encode(prompt)] * members)
    given = for_rows(made.engine.text.inputs(prompt), members, ids.shape[1], made.model)
    return made.model(ids, use_cache=False, **given).logits


@kinds
def test_full_noise(kind, tmp_path):
    made = build(seeing.save_model(tmp_path, kind), "es.perturbation=full")
    assert made.facts.left_out == ()
    made.perturbation.set(MEMBERS[:1], SIGMA)
    completions = made.engine.generate(PROMPTS)
    assert completions.ids == generated(made)
    assert len({tuple(answer) for answer in completions.ids}) > 2
    read = made.engine.log_probabilities(PROMPTS, completions.ids)
    for prompt, answer, values in zip(PROMPTS, completions.ids, read, strict=True):
        ids = torch.tensor([made.engine.text.encode(prompt) + answer])
        given = for_rows(made.engine.text.inputs(prompt), 1, ids.shape[1], made.model)
        with torch.inference_mode():
            chances = torch.log_softmax(made.model(ids, use_cache=False, **given).logits[0], dim=-1)
        expected = chances[-len(answer) - 1 : -1][range(len(answer)), answer]
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-4, rtol=0)


@kinds
def test_low_rank(kind, tmp_path):
    made = build(seeing.save_model(tmp_path, kind), "es.perturbation=lowrank", "es.block=3")
    made.perturbation.set(MEMBERS, SIGMA)
    answers = made.engine.generate_block(PROMPTS, len(MEMBERS))
    made.perturbation.rows(torch.arange(len(MEMBERS)))
    blocks = [logits(made, prompt, len(MEMBERS)) for prompt in PROMPTS]
    made.perturbation.clear()
    plain = [logits(made, prompt) for prompt in PROMPTS]
    for number, member in enumerate(MEMBERS):
        made.weights.show(zoo.materialised(made.weights, member, SIGMA))
        for prompt, block, before in zip(PROMPTS, blocks, plain, strict=True):
            expected = logits(made, prompt)[0]
            assert (expected - before[0]).abs().max() > 0.5, "the perturbation is large enough to be seen"
            torch.testing.assert_close(block[number], expected, atol=1e-4, rtol=1e-4)
        assert answers[number].ids == generated(made)
