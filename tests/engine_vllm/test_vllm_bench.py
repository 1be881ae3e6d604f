"""The bench with vLLM: its figures are there, and of the work that they name."""

from __future__ import annotations

import json

import launching
import numpy as np
import one_vllm
import pytest
import torch

from mpies.bench import multilora, vllm_lowrank
from mpies.bench.__main__ import parse
from mpies.bench.generation import Work

WORK = Work(members=3, prompts=2, tokens=5)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(kind="llama", tied=True, hidden=128)


def rig_of(world, model):
    given = parse(["--model", str(model), "--device", "cpu"])
    return one_vllm.alone(lambda: vllm_lowrank.rig_for(world, given, "float32", WORK))


@pytest.mark.slow
def test_figures(model, tmp_path):
    given = ["--only", "vllm", "vllm-lowrank", "--model", model, "--dtype", "float32", "--repeats", "1"]
    given += ["--members", "3", "--tokens", "5", "--json", tmp_path / "bench.json"]
    ended = launching.python("-m", "mpies.bench", *given, timeout=280)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert all(figure["value"] > 0 for figure in figures)
    targets = {(f["group"], f["name"]): f["least"] for f in figures if f["least"]}
    everything = "low rank, everything: speed of vLLM's own generate"
    small, large = f"vLLM, low rank, {WORK}", "vLLM, low rank, 12 members x 4 prompts x 6 tokens"
    assert {name: least for (group, name), least in targets.items() if group == small} == {
        everything: 88,
        "low rank in vLLM, against low rank in the hf engine": 1.3,
        "low rank in vLLM, against full noise in vLLM": 8,
        "low rank in vLLM, against the paper's way": 28,
    }
    assert targets[large, everything] == 92
    assert "multi-LoRA" in ended.stdout


@torch.inference_mode()
def test_the_work_is_the_same_in_every_way(world, model, monkeypatch):
    """Rows and tokens of low rank, of vLLM's own generation, and of the hf engine; base and members move."""
    rig = rig_of(world, model)
    generation = vllm_lowrank.Generation(rig, WORK, lambda: None)
    made = []
    generate = generation.engine.llm.generate
    monkeypatch.setattr(
        generation.engine.llm, "generate", lambda *given, **named: made.append(generate(*given, **named))
    )
    generation.alone()
    monkeypatch.undo()
    answers = [list(output.outputs[0].token_ids) for output in made[0]]
    assert len(answers) == 6 and {len(answer) for answer in answers} == {WORK.tokens}
    assert answers == [list(ids) for ids in generation.engine.generate(generation.prompts).ids] * 3
    rig.lowrank.set(generation.members, 0.3)
    blocks = generation.engine.generate_block(generation.prompts, WORK.members)
    assert [ids for one in blocks for ids in one.ids] != answers
    assert {count for one in blocks for count in one.tokens} == {WORK.tokens}
    generation.rest()
    digest = rig.weights.digest()
    generation.lowrank()
    assert rig.weights.digest() != digest


def test_every_member_has_an_adapter_of_its_own(world, model, tmp_path, monkeypatch):
    monkeypatch.setattr(multilora, "SIGMA", 1.0)
    rig = rig_of(world, model)
    subject = multilora.LoraBase.of(str(model), rig.original, vllm_lowrank.encode(rig, WORK))
    assert len(subject.layers) == 14  # seven in each of the two layers
    del rig
    made = one_vllm.alone(lambda: multilora.Adapters(subject, WORK, str(tmp_path)))
    plain, first = made.generate(None), made.generate(made.new())
    by_member = np.array(first).reshape(WORK.members, -1).tolist()
    assert plain[:2] * 3 == plain and len({str(answers) for answers in by_member}) == WORK.members
    assert made.generate(made.new()) == first
