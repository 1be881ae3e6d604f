"""model.master=live: the base in bfloat16, rounded at random, and still every generation is found again."""

from __future__ import annotations

from pathlib import Path

import h5py
import launching
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpies.errors import InputError
from mpies.model import loading
from mpies.model.weights import Weights, take_over
from mpies.noise import definition
from mpies.noise.cpu import CpuKernels

CPU = torch.device("cpu")
SEEDS = np.array([11, 2**64 - 1], dtype=np.uint64)
FACTORS = np.array([1e-5, -3e-5], dtype=np.float32)
SETTINGS = {
    "task.name": "conciseness",
    "model.dtype": "bfloat16",
    "model.device": "cpu",
    "model.master": "live",
    "es.population": 6,
    "es.block": 2,
    "es.sigma": 0.3,
    "es.alpha": 0.3,
    "es.anchor_decay": 0.1,
    "engine.max_new_tokens": 12,
    "run.checkpoint_every": 2,
}


@pytest.fixture
def weights(tiny_model):
    """weights(master, rank) of a tiny float32 model, live in bfloat16."""

    def load(master=torch.bfloat16, rank=0) -> Weights:
        model, _ = loading.load(str(tiny_model()), allow_download=False)
        return take_over(model, torch.bfloat16, CPU, CpuKernels(1), rank, master)

    return load


def values(weights: Weights) -> torch.Tensor:
    return torch.cat([weights.value(name).reshape(-1) for name in weights.base])


def test_the_base_takes_half_the_memory(weights):
    bytes_of = [
        sum(base.nbytes for base in weights(m).base.values()) for m in (torch.bfloat16, torch.float32)
    ]
    assert 2 * bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_update_is_the_float32_update_rounded_by_the_definition(weights, rank):
    made = weights(rank=rank)
    start = {name: made.value(name).numpy().copy() for name in made.base}
    made.update(SEEDS, FACTORS)
    for name, value in start.items():
        number = definition.parameter_id(name)
        if rank and value.ndim == 2:
            exact = definition.lowrank_updated(value, SEEDS, FACTORS, number, rank)
        else:
            exact = definition.updated(value.reshape(-1), SEEDS, FACTORS, number)
        expected = definition.rounded(exact.reshape(-1), int(SEEDS[0]), number)
        assert np.array_equal(made.base[name].view(-1).view(torch.int16).numpy(), expected.view(np.int16))


def test_steps_below_the_spacing_count_on_average(weights):
    """Rounding to nearest would lose every one of these updates."""
    made, truth = weights(), weights(torch.float32)
    for name, base in made.base.items():
        truth.base[name].copy_(base)
    start = values(made)
    for seed in range(400):
        for each in (made, truth):
            each.update(np.array([seed], dtype=np.uint64), np.array([1e-5], dtype=np.float32))
    moved, meant = values(made) - start, values(truth) - start
    # In the direction that was meant, by as much; the rest is rounding noise.
    share = float(moved.double() @ meant.double() / (meant.double() @ meant.double()))
    assert 0.8 < share < 1.2
    nearest = start.bfloat16()
    for _ in range(400):
        nearest += 1e-5
    assert torch.equal(nearest[start.abs() > 0.01], start.bfloat16()[start.abs() > 0.01])


def test_float16_is_refused(tiny_model):
    model, _ = loading.load(str(tiny_model()), allow_download=False)
    with pytest.raises(InputError, match=r"model\.master: live needs .*bfloat16.* float16"):
        take_over(model, torch.float16, CPU, CpuKernels(1), 0, torch.float16)


# Whole runs


def train(folder: Path, model: Path, ranks: int, **changes) -> str:
    settings = SETTINGS | {"model.path": model, "run.directory": folder} | changes
    program = ["-m", "mpies.train", *(f"{key}={value}" for key, value in settings.items())]
    ended = launching.mpirun(ranks, *program)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.launch
@pytest.mark.parametrize("perturbation", [pytest.param("full", marks=pytest.mark.long), "lowrank"])
def test_a_run_goes_on_and_is_replayed_bit_for_bit(tiny_model, tmp_path, perturbation):
    kind = {"es.perturbation": perturbation}
    model = tiny_model()
    train(tmp_path / "whole", model, 1, **kind, **{"es.generations": 4})
    parted = tmp_path / "parted"
    train(parted, model, 2, **kind, **{"es.generations": 3})
    said = train(parted, model, 2, **kind, **{"es.generations": 4})
    assert "replayed from checkpoint 2" in said
    digests = [h5py.File(d / "run.h5")["generation/digest"][:].tolist() for d in (tmp_path / "whole", parted)]
    assert digests[0] == digests[1] and len(set(digests[0])) == 4

    verified = launching.python("-m", "mpies.replay", parted / "run.h5", "--verify")
    assert verified.returncode == 0 and "4 of 4 generations' digests agree" in verified.stdout
    out = tmp_path / "out"
    again = launching.python("-m", "mpies.replay", parted / "run.h5", "--output", out, "--dtype", "float32")
    assert again.returncode == 0, again.stderr
    tuned = load_file(parted / "model" / "model.safetensors")
    for name, value in load_file(out / "model.safetensors").items():
        assert value.dtype == torch.float32 and torch.equal(value, tuned[name].float()), name
