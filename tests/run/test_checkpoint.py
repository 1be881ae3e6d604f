"""Checkpoints: written and restored bit for bit, and never believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mpies.errors import StorageError
from mpies.model.weights import Weights
from mpies.replica import load_model
from mpies.run import checkpoint

UUID = "0123-abcd"
CPU = torch.device("cpu")


@pytest.fixture
def fresh(tiny_model):
    """fresh(...): the weights of a tiny model, as they are loaded."""

    def make(dtype=torch.float32, master=torch.float32, **options) -> Weights:
        path = str(tiny_model(**options))
        return load_model(path, device=CPU, dtype=dtype, master=master, rank=0, threads=1).weights

    return make


def name_of(generation: int) -> str:
    return f"checkpoint-{generation:06d}.safetensors"


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_cannot_be_read_twice_is_no_initial_model(fresh, run, monkeypatch):
    folder, digests = run
    monkeypatch.setattr(Weights, "restore", lambda self, name, stored: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(StorageError, match=r"cannot be read a second time \(gone\)"):
        checkpoint.restore(folder, fresh(), UUID, digests, 5)


def move(weights: Weights, generation: int) -> int:
    """An update, as after that many generations; the digest."""
    weights.update(np.array([generation], np.uint64), np.array([0.1], np.float32))
    return weights.digest()


@pytest.fixture
def run(fresh, tmp_path):
    """A folder with the checkpoints of generations 2 and 4, and the digests of five generations."""
    weights, digests = fresh(), []
    for generation in range(1, 6):
        digests.append(move(weights, generation))
        if generation in (2, 4):
            checkpoint.write(tmp_path, weights, UUID, generation)
    return tmp_path, np.array(digests, np.uint64)


def restored(fresh, run, limit: int, uuid=UUID, **options) -> tuple[int, list[str]]:
    """The generation that is restored, with what is said; the digest is proved to be that one's."""
    folder, digests = run
    weights, said = fresh(**options), []
    initial = weights.digest()
    found = checkpoint.restore(folder, weights, uuid, digests, limit, said.append)
    assert weights.digest() == (int(digests[found - 1]) if found else initial)
    return found, said


@pytest.mark.parametrize("limit, found", [(5, 4), (4, 4), (3, 2), (2, 2), (1, 0), (0, 0)])
def test_the_newest_that_is_not_too_new_is_restored(fresh, run, limit, found):
    assert restored(fresh, run, limit) == (found, [])


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"kind": "llama", "tied": True}, {"kind": "qwen2", "tied": False}])
def test_every_bit_comes_back(fresh, tmp_path, options, master):
    weights = fresh(torch.bfloat16, master, **options)
    digest = move(weights, 1)
    checkpoint.write(tmp_path, weights, UUID, 1)
    back = fresh(torch.bfloat16, master, **options)
    assert checkpoint.restore(tmp_path, back, UUID, np.array([digest], np.uint64), 1) == 1
    for name, base in weights.base.items():
        assert torch.equal(back.base[name], base) and back.base[name].dtype == master
    assert move(back, 2) == move(weights, 2)


def test_it_is_a_safetensors_file_that_says_whose_it_is(fresh, tmp_path):
    weights = fresh()
    move(weights, 1)
    checkpoint.write(tmp_path, weights, UUID, 37)
    assert there(tmp_path) == [name_of(37)]
    with safe_open(tmp_path / name_of(37), "pt") as file:
        assert file.metadata() == {"run_uuid": UUID, "generation": "37"}
    tensors = load_file(tmp_path / name_of(37))
    assert tensors.keys() == weights.base.keys()
    assert all(torch.equal(tensors[name], base) for name, base in weights.base.items())
    head = (tmp_path / name_of(37)).read_bytes()
    assert int.from_bytes(head[:8], "little") % 8 == 0, "tensors begin where they can be mapped"


def test_the_newest_two_are_kept_and_none_of_a_later_generation(fresh, tmp_path):
    """Of later generations are those of another run that was in this folder."""
    weights = fresh()
    (tmp_path / name_of(90)).write_bytes(b"another run's")
    (tmp_path / "checkpoint-best.safetensors").write_bytes(b"a user's")
    seen = []
    for generation in (10, 20, 30, 40):
        checkpoint.write(tmp_path, weights, UUID, generation)
        seen.append([name for name in there(tmp_path) if name != "checkpoint-best.safetensors"])
    assert seen == [
        [name_of(10)],
        [name_of(10), name_of(20)],
        [name_of(20), name_of(30)],
        [name_of(30), name_of(40)],
    ]
    assert (tmp_path / "checkpoint-best.safetensors").exists()


def test_a_generation_beyond_a_million_is_the_newest(fresh, run):
    """Its name sorts before the others'."""
    folder, digests = run
    (folder / name_of(4)).rename(folder / name_of(1_000_004))
    assert restored(fresh, (folder, digests), 5) == (2, [])
    checkpoint.write(folder, fresh(), UUID, 1_000_005)
    assert there(folder) == [name_of(1_000_004), name_of(1_000_005)]


# Those that cannot be used are skipped with a line


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def rewrite(path: Path, change, **metadata: str) -> None:
    """The same file with other tensors or another origin."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"run_uuid": UUID, "generation": "4", **metadata})


def drop_one(tensors: dict) -> None:
    tensors.pop("model.norm.weight")


def add_one(tensors: dict) -> None:
    tensors["model.other.weight"] = torch.zeros(3)


def reshape_one(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(4, -1)


def retype_one(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()


def nothing(tensors: dict) -> None:
    pass


@pytest.mark.parametrize(
    "damage, says",
    [
        (flip_a_bit, "damaged: its digest is not the run file's; skipped"),
        (truncate, "unreadable ("),
        (lambda path: path.write_bytes(b""), "unreadable ("),
        (lambda path: path.write_bytes(b"no safetensors at all"), "unreadable ("),
        (lambda path: rewrite(path, drop_one), "it holds other parameters; skipped"),
        (lambda path: rewrite(path, add_one), "it holds other parameters; skipped"),
        (lambda path: rewrite(path, reshape_one), "it holds another model.norm.weight; skipped"),
        (lambda path: rewrite(path, retype_one), "it holds another model.norm.weight; skipped"),
        (lambda path: rewrite(path, nothing, run_uuid="another"), "it belongs to another run; skipped"),
        (lambda path: rewrite(path, nothing, generation="3"), "it belongs to another run; skipped"),
        (lambda path: save_file(load_file(path), path), "it belongs to another run; skipped"),
    ],
)
def test_what_is_wrong_with_the_newest_is_told_and_the_next_is_used(fresh, run, damage, says):
    damage(run[0] / name_of(4))
    found, (line,) = restored(fresh, run, 5)
    assert found == 2
    assert line.startswith(f"{name_of(4)}: {says}") and line.endswith("; skipped")


def test_without_any_that_can_be_used_the_base_stays_initial(fresh, run):
    for generation in (2, 4):
        flip_a_bit(run[0] / name_of(generation))
    found, lines = restored(fresh, run, 5)
    assert found == 0 and [line.split(":")[0] for line in lines] == [name_of(4), name_of(2)]


def test_another_runs_and_another_models_are_skipped(fresh, run):
    found, lines = restored(fresh, run, 5, uuid="another")
    assert found == 0 and all("another run" in line for line in lines) and len(lines) == 2
    assert restored(fresh, run, 5, kind="qwen2")[0] == 0
    assert restored(fresh, run, 5, hidden=64)[0] == 0


def test_a_bfloat16_base_takes_no_float32_checkpoint(fresh, run):
    found, lines = restored(fresh, run, 5, dtype=torch.bfloat16, master=torch.bfloat16)
    assert found == 0 and all("it holds another " in line for line in lines)


def test_a_checkpoint_that_cannot_be_written_is_one_line(fresh, tmp_path):
    (tmp_path / name_of(5)).mkdir()  # which no file can replace
    with pytest.raises(StorageError, match=r"checkpoint-000005\.safetensors: cannot write the checkpoint \("):
        checkpoint.write(tmp_path, fresh(), UUID, 5)
    assert there(tmp_path) == [name_of(5)], "no partial file is left"
    with pytest.raises(StorageError, match="cannot write"):
        checkpoint.write(tmp_path / "nowhere", fresh(), UUID, 5)
