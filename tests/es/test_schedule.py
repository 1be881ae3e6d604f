"""Schedules of sigma and alpha, the decay towards the initial weights, and that replay follows them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import h5py
import launching
import made_up
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import Job, arguments, assert_same_run, refused, train
from mpies import config
from mpies.errors import InputError
from mpies.es import schedule
from mpies.model import loading
from mpies.model.anchor import Anchor
from mpies.model.weights import Weights, take_over
from mpies.noise.cpu import CpuKernels


def values(name: str, **settings) -> list[float]:
    es = config.EsSettings(**settings)
    return [getattr(schedule.step(es, g), name) for g in range(es.generations)]


def test_the_papers_values_stay_as_they_are():
    assert values("sigma", generations=5) == [0.001] * 5
    assert values("alpha", generations=5) == [0.0005] * 5
    assert values("anchor_decay", generations=5) == [0] * 5


@pytest.mark.parametrize("name", ["sigma", "alpha"])
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"schedule": "linear", "end": 0.5}, [1, 0.875, 0.75, 0.625, 0.5]),
        ({"schedule": "cosine", "end": 0.2}, [1, 0.882842712475, 0.6, 0.317157287525, 0.2]),
        ({"schedule": "cosine", "end": 0.2, "warmup": 2}, [0.5, 1, 1, 0.6, 0.2]),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "linear", "end": 0.5, "warmup": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "linear", "end": 2.0}, [1, 1.25, 1.5, 1.75, 2]),
        ({"schedule": "linear", "warmup": 10}, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_schedules(name, settings, expected):
    given = {f"{name}_{key}": value for key, value in settings.items()}
    assert values(name, generations=5, **{name: 1.0}, **given) == expected
    other = "alpha" if name == "sigma" else "sigma"
    assert len(set(values(other, generations=5, **given))) == 1


@pytest.mark.parametrize("generations", [1, 2])
def test_short_runs(generations):
    assert (
        values("alpha", generations=generations, alpha=1.0, alpha_schedule="linear") == [1, 0.1][:generations]
    )


# Decay


@pytest.fixture
def loaded(tiny_model):
    """loaded(folder) -> weights; without a folder, those of a tiny model."""

    def load(folder: Path | None = None, dtype=torch.float32) -> tuple[str, Weights]:
        path = str(folder or tiny_model())
        model, _ = loading.load(path, allow_download=False)
        return path, take_over(model, dtype, torch.device("cpu"), CpuKernels(1))

    return load


def pull(anchor: Anchor, weights: Weights, decay: float) -> None:
    """An update by the anchor alone, without any member."""
    nothing = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.float32)
    weights.update(*nothing, anchor.pulling(decay))


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"kind": "qwen2", "dtype": torch.bfloat16}])
def test_decay_moves_a_share_of_the_way(loaded, tiny_model, options):
    path, weights = loaded(tiny_model(**options))
    start = {name: base.clone() for name, base in weights.base.items()}
    anchor = Anchor(path, weights, weights.digest())
    pull(anchor, weights, 0.25)
    assert all(torch.equal(base, start[name]) for name, base in weights.base.items())
    weights.update(np.array([5], dtype=np.uint64), np.array([0.5], dtype=np.float32))
    moved = {name: base.clone() for name, base in weights.base.items()}
    pull(anchor, weights, 0.25)
    for name, base in weights.base.items():
        # Step by step in float32, as a reader of the docstring would compute it.
        change = np.float32(0.25) * (start[name].numpy() - moved[name].numpy())
        assert np.array_equal(base.numpy(), moved[name].numpy() + change)
        assert not torch.equal(base, moved[name]) and not torch.equal(base, start[name])


def test_sharded_models(loaded, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for part, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / part, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: part for part, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    path, weights = loaded(folder)
    pull(Anchor(path, weights, weights.digest()), weights, 0.5)


def test_other_values_on_disk_are_refused(loaded, tiny_model):
    path, weights = loaded()
    with pytest.raises(InputError, match=r"es\.anchor_decay: .*other values"):
        Anchor(str(tiny_model(seed=1)), weights, weights.digest())
    with pytest.raises(InputError, match=r"es\.anchor_decay: .*another shape"):
        Anchor(str(tiny_model(hidden=64)), weights, weights.digest())
    with pytest.raises(InputError, match=r"es\.anchor_decay: no safetensors files"):
        Anchor(str(Path(path) / "nothing"), weights, weights.digest())


# Runs

SETTINGS = {
    "es__alpha_schedule": "cosine",
    "es__alpha_warmup": 2,
    "es__sigma_schedule": "linear",
    "es__sigma_end": 0.5,
    "es__anchor_decay": 0.125,
    "es__fitness": "centered_rank",
}


@pytest.mark.long
@pytest.mark.launch
def test_a_run_with_all_of_it_is_exact_and_replayable(tmp_path, tiny_model):
    """On one rank, and on two ranks killed in between: the same run; replay proves every digest."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    train(1, *arguments(tiny_model(), alone, 8, **SETTINGS))
    settings = arguments(tiny_model(), killed, 8, **SETTINGS, run__checkpoint_every=2)
    with Job(2, *settings) as job:
        job.wait_for("generation 3/")
        job.kill()
    output = train(2, *settings)
    assert re.search(r"resuming after generation [3-7], replayed from checkpoint [246]", output)
    assert_same_run(alone, killed, 8)
    es = config.from_yaml(h5py.File(alone / "run.h5")["config/000"].asstr()[()]).es
    with h5py.File(alone / "run.h5") as file:
        for name in ("sigma", "alpha", "anchor_decay"):
            expected = [getattr(schedule.step(es, g), name) for g in range(8)]
            assert file[f"generation/{name}"][:].tolist() == expected
    ended = launching.python("-m", "mpies.replay", alone / "run.h5", "--verify")
    assert ended.returncode == 0 and "8 of 8 generations' digests agree" in ended.stdout
    # The values in the file count, not the settings.
    with h5py.File(alone / "run.h5", "r+") as file:
        file["generation/anchor_decay"][5] = 0.25
        made_up.seal_all(file)
    ended = launching.python("-m", "mpies.replay", alone / "run.h5", "--verify")
    assert ended.returncode == 1 and "first generation that does not: 6" in ended.stdout
    (line,) = refused(*arguments(tiny_model(), alone, 8, **SETTINGS | {"es__anchor_decay": 0}))[:-1]
    assert line.startswith("es.anchor_decay: ")
