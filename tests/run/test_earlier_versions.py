"""A run that an earlier version began goes on with the same bits."""

from __future__ import annotations

import gzip
import shutil

import h5py
import launching
import pytest

pytestmark = pytest.mark.lengthy

BEGUN = launching.DATA / "begun-by-0.1.0"

# What version 0.1.0 was begun with, for 3 generations; it was then asked for 5 in one go elsewhere.
SETTINGS = [
    "model.path=model",
    "model.dtype=float32",
    "es.population=4",
    "es.sigma=0.3",
    "es.alpha=0.5",
    "es.antithetic=true",
    "es.perturbation=lowrank",
    "es.block=2",
    "es.anchor_decay=0.05",
    "engine.max_new_tokens=8",
    # The quickstart's of then, which these settings were added to.
    "task.name=conciseness",
    "engine.batch_size=32",
    "run.keep_samples=1",
    "run.progress=lines",
]
DIGESTS = [0xD561CF23ABEEA000, 0xD561CF23ABEEA000, 0x744925AB537AD6E, 0xBE76297916F3F24D, 0x5E59C6B001E9ACC2]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of that run, with its model where it was: beside it."""
    shutil.copytree(BEGUN / "model", tmp_path / "model")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.h5").write_bytes(gzip.decompress((BEGUN / "run.h5.gz").read_bytes()))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "half"


def test_a_run_begun_by_0_1_0_goes_on(begun):
    ended = launching.python(
        "-m", "mpies.train", *SETTINGS, f"run.directory={begun}", "es.generations=5", cwd=begun.parent
    )
    assert ended.returncode == 0, ended.stderr
    assert "resuming after generation 3" in ended.stdout
    with h5py.File(begun / "run.h5", "r") as file:
        assert file["generation/digest"][:].tolist() == DIGESTS
        assert file["start/reason"].asstr()[:].tolist() == ["new", "resumed"]


def test_a_run_begun_by_0_1_0_is_replayed(begun):
    ended = launching.python("-m", "mpies.replay", begun / "run.h5", "--verify", cwd=begun.parent)
    assert ended.returncode == 0, ended.stderr
    assert "3 of 3 generations' digests agree" in ended.stdout
