"""transformers' architectures, one by one: a run is replayed bit for bit, its tuned model is what was tuned.

transformers stacks experts, splits and renames when it reads a model's files, and undoes it when it writes
them: a fault of either would be an export that is silently another model.
"""

from __future__ import annotations

import h5py
import pytest
import small
import tiny
import torch
import zoo

from mpies import replay
from mpies.model import loading, saving
from mpies.replica import load_model

# Experts, in stacks of two kinds; rows that transformers would lose.
QUICK = {"qwen3_moe", "gpt_oss", "youtu"}
# A run of them is refused: test_zoo.py.
REFUSED = {"minimax", "openai-gpt", "recurrent_gemma", "rwkv", "xlstm"}
PRESENT = sorted(set(zoo.ARCHITECTURES) - set(zoo.missing()))
architectures = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PRESENT]
)
CPU = torch.device("cpu")


@pytest.fixture
def folder(name, tmp_path):
    """A model of an architecture, as mpies writes it."""
    saving.save(zoo.build(name), tiny.tokenizer(), tmp_path / "initial")
    return tmp_path / "initial"


@architectures
def test_what_is_written_is_what_is_read(name, folder):
    model, (again, _) = zoo.build(name), loading.load(str(folder), allow_download=False)
    assert type(again) is type(model)
    assert_alike(model, again, compute=name != "xlstm")


@pytest.mark.parametrize("name", [each for each in architectures.args[1] if each.values[0] not in REFUSED])
def test_a_run_its_replay_and_its_export(name, folder, alone, tmp_path):
    """Low rank: the file's last digest is that of the replayed weights, and of the tuned model's."""
    with small.Runs(alone, folder, tmp_path) as runs:
        settings = {"es__perturbation": "lowrank", "es__block": 4, "es__sigma": 0.3}
        assert runs.train(1, **settings, engine__batch_size=8, es__leave_out=[]) == 0
        assert replay.main([str(runs.folder / "run.h5"), "--verify", "--threads=1"]) == 0
    with h5py.File(runs.folder / "run.h5") as file:
        digest = file["generation/digest"][0]
        assert digest != file.attrs["model_digest"]
    options = {"device": CPU, "dtype": torch.float32, "master": torch.float32, "rank": 1, "threads": 1}
    tuned = load_model(str(runs.folder / "model"), **options)
    assert tuned.weights.digest() == digest
    # What is no parameter, as tables of positions.
    initial = load_model(str(folder), **options)
    initial.weights.show(tuned.weights.base.items())
    assert_alike(initial.model, tuned.model)


@torch.inference_mode()
def assert_alike(one: torch.nn.Module, other: torch.nn.Module, compute: bool = True) -> None:
    """Both have the same parameters, and make the same logits, if they can be computed."""
    values, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert values.keys() == others.keys()
    assert [key for key, value in values.items() if not torch.equal(value, others[key])] == []
    ids = torch.arange(4, 30)[None]
    assert not compute or torch.equal(one(ids).logits, other(ids).logits)
