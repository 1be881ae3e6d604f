"""Models that read images: in batches and in blocks, they compute what their weights say.

What is right is what transformers' own generation makes of one prompt, with the members' weights written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import seeing
import small
import torch
import zoo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import arguments
from mpies import replay, train
from mpies.engines.vision import for_rows
from mpies.replica import Replica
from mpies.runfile.checksum import seal

# Earlier versions of transformers have no processors that work by Pillow alone.
pytest.importorskip("transformers.image_processing_backends")

NEW, SIGMA, MEMBERS = 8, 0.05, zoo.MEMBERS
STOPS = set(range(0, 99, 7))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in seeing.KINDS if name != "qwen2_5_vl"]
kinds = pytest.mark.parametrize("kind", ["qwen2_5_vl", *SLOW])


def generated(made: Replica) -> list[list[int]]:
    """Each prompt's answer alone, by transformers' own generation."""
    answers = []
    for prompt in seeing.PROMPTS:
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


def build(folder: Any, kind: str, *overrides: str) -> Replica:
    given = [f"engine.max_new_tokens={NEW}", *overrides]
    made = seeing.start(seeing.save_model(folder, kind), *given)
    made.engine.text.stops = STOPS
    return made


@kinds
def test_full_noise(kind, tmp_path):
    made = build(tmp_path, kind, "es.perturbation=full")
    assert made.facts.left_out == ()
    made.perturbation.set(MEMBERS[:1], SIGMA)
    completions = made.engine.generate(seeing.PROMPTS)
    assert completions.ids == generated(made)
    assert len({tuple(answer) for answer in completions.ids}) > 2
    read = made.engine.log_probabilities(seeing.PROMPTS, completions.ids)
    for prompt, answer, values in zip(seeing.PROMPTS, completions.ids, read, strict=True):
        ids = torch.tensor([made.engine.text.encode(prompt) + answer])
        given = for_rows(made.engine.text.inputs(prompt), 1, ids.shape[1], made.model)
        with torch.inference_mode():
            chances = torch.log_softmax(made.model(ids, use_cache=False, **given).logits[0], dim=-1)
        expected = chances[-len(answer) - 1 : -1][range(len(answer)), answer]
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-4, rtol=0)


@kinds
def test_low_rank(kind, tmp_path):
    made = build(tmp_path, kind, "es.perturbation=lowrank", "es.block=3")
    made.perturbation.set(MEMBERS, SIGMA)
    answers = made.engine.generate_block(seeing.PROMPTS, len(MEMBERS))
    made.perturbation.rows(torch.arange(len(MEMBERS)))
    blocks = [logits(made, prompt, len(MEMBERS)) for prompt in seeing.PROMPTS]
    made.perturbation.clear()
    plain = [logits(made, prompt) for prompt in seeing.PROMPTS]
    for number, member in enumerate(MEMBERS):
        made.weights.show(zoo.materialised(made.weights, member, SIGMA))
        for prompt, block, before in zip(seeing.PROMPTS, blocks, plain, strict=True):
            expected = logits(made, prompt)[0]
            assert (expected - before[0]).abs().max() > 0.5, "the perturbation is large enough to be seen"
            torch.testing.assert_close(block[number], expected, atol=1e-4, rtol=1e-4)
        assert answers[number].ids == generated(made)


REWARD = """
def reward(prompts, completions, image, **columns):
    (parts,) = {type(prompt[-1]["content"]) for prompt in prompts}
    assert parts is list and all(one.open().mode == "RGB" for images in image for one in images)
    texts = [answer[-1]["content"] for answer in completions]
    return [-(sum(i * ord(c) for i, c in enumerate(text, 1)) % 101) / 7 for text in texts]
"""


@pytest.fixture
def job(alone, tmp_path):
    """job(directory, rows, **settings) -> the settings of a run of qwen2_5_vl, three generations long."""
    model = seeing.save_model(tmp_path / "model", "qwen2_5_vl")
    (tmp_path / "rewards.py").write_text(REWARD)

    def write(directory: str, rows: list[dict[str, Any]], **settings: Any) -> list[str]:
        data = tmp_path / "data" / f"{directory}.jsonl"
        data.parent.mkdir(exist_ok=True)
        data.write_text("\n".join(map(json.dumps, rows)))
        own = {"task__train_data": data, "engine__max_new_tokens": 4, "es__population": 4}
        return arguments(model, tmp_path / directory, 3, **(own | settings))

    yield write
    torch.set_num_threads(1)


def replayed(path: Path) -> None:
    assert replay.main([str(path / "run.h5"), "--verify", "--threads=1"]) == 0


def initial_and_tuned(tmp_path: Path, directory: str) -> list[dict[str, torch.Tensor]]:
    folders = tmp_path / "model", tmp_path / directory / "model"
    return [load_file(folder / "model.safetensors") for folder in folders]


def test_a_run_on_images(job, alone, tmp_path):
    """Files beside the data; the tuned model, all of which has moved, reads images."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for number, size in enumerate([(24, 16), (16, 16)]):
        (tmp_path / "data" / "pictures" / f"{number}.png").write_bytes(seeing.picture(*size))
    rows = [{"prompt": f"What is in {n}?", "image": f"pictures/{n}.png"} for n in (0, 1)]
    reward = f"{tmp_path / 'rewards.py'}:reward"
    given = job("run", rows, task__reward=reward, task__image_column="image", es__perturbation="lowrank")
    assert train.main(alone, given) == 0
    replayed(tmp_path / "run")
    before, after = initial_and_tuned(tmp_path, "run")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert seeing.start(tmp_path / "run" / "model").task.has_images
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert "left_out" not in file.attrs
        assert file["sample/prompt"].asstr()[0] == "<image>What is in 0?"


def test_what_no_answer_depends_on_is_left_out(job, alone, tmp_path):
    """Text alone: the tower stays as it is, in the run, when it goes on, and when it is replayed."""
    rows = [{"prompt": "3 + 5 ="}, {"prompt": "Say it."}]
    given = job("run", rows, task__reward="small:reward")
    assert train.main(alone, [*given, "es.generations=1"]) == 0
    assert train.main(alone, given) == 0
    replayed(tmp_path / "run")
    before, after = initial_and_tuned(tmp_path, "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "visual" not in name}
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert file.attrs["left_out"] == "model.visual"
        digest, parameters = file.attrs["model_digest"], file.attrs["parameters"]
    assert parameters == sum(before[name].numel() for name in moved)
    # Files of versions that tuned everything say nothing, and mean that.
    assert train.main(alone, job("all", rows, task__reward="small:reward", es__leave_out="[]")) == 0
    replayed(tmp_path / "all")
    before, after = initial_and_tuned(tmp_path, "all")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with h5py.File(tmp_path / "all" / "run.h5") as file:
        assert "left_out" not in file.attrs
        assert file.attrs["model_digest"] == digest, "it is the same initial model"


def test_a_decoder_that_transformers_has_alone_as_well(alone, tmp_path):
    """Qwen3.5's: a run tunes the whole model; one that an earlier version began goes on with the decoder."""
    whole, decoder = seeing.save_model(tmp_path / "whole", "qwen3_5"), tmp_path / "decoder"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(decoder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(decoder)
    with small.Runs(alone, whole, tmp_path) as runs:
        assert runs.train(1) == 0
        replayed(runs.folder)
        before, after = (load_file(folder / "model.safetensors") for folder in (whole, runs.folder / "model"))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "visual" not in name} == after.keys() - tower(after)
        with h5py.File(runs.folder / "run.h5") as file:
            assert file.attrs["model_class"] == "Qwen3_5ForConditionalGeneration"
        runs.folder = tmp_path / "earlier"
        assert runs.train(1, model__path=decoder) == 0
        with h5py.File(runs.folder / "run.h5", "r+") as file:
            del file.attrs["model_class"]
            seal(file, "start")
        assert runs.train(2, run__measure_drift="true") == 0
        assert replay.main([str(runs.folder / "run.h5"), "--verify", "--threads=1", f"--model={whole}"]) == 0
        assert not tower(load_file(runs.folder / "model" / "model.safetensors"))


def tower(names: Iterable[str]) -> set[str]:
    return {name for name in names if "visual" in name}
