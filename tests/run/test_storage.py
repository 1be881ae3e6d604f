"""Storage that fails: every rank ends with one clear line, and what was committed stays whole.

A small file system in memory is the disk, whose size changes while a job writes to it. A quota that is
used up (EDQUOT) is the same to the program as a full disk (ENOSPC): an OSError from the same call.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest

from jobs import Job, arguments, assert_same_model, assert_same_run, committed, refused, train

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small file system"
    ),
]

GENERATIONS = 12
MANY = 1000
PAGE = 4096
PLENTY = 64 * 2**20
WITHIN = 15  # the promise: after that many seconds, no rank is left
BIG = {"hidden": 192}  # a model of 2.4 MB, several times the run file


class Disk:
    """A file system of a few pages, mounted on a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "mpies-test", folder])
        if mounted.returncode:
            pytest.skip("this root cannot mount, as in most containers")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def leave(self, free: int) -> None:
        """Make it as small as it can be with so many free bytes."""
        status = os.statvfs(self.folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self.remount(f"size={used + -(-free // PAGE) * PAGE}")

    def grow(self) -> None:
        self.remount(f"size={PLENTY}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    yield Disk(folder)
    # Lazily: a test that failed may have left a process on it.
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model) -> Path:
    """The same run of the larger model on a disk that is fine."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(2, *arguments(tiny_model(**BIG), folder, GENERATIONS))
    return folder


def assert_ends_with_a_line(job: Job, *words: str) -> None:
    """Soon, with all ranks, because of a failure that can be mended, and without noise."""
    start = time.monotonic()
    assert job.end(60) == 1, job.output
    assert time.monotonic() - start < WITHIN
    lines = launching.problems(job.output)
    assert len(lines) == 1, job.output
    for word in words:
        assert word in lines[0]
    for noise in ("Traceback", "TERMINATION", "h5py", "Exception ignored", "HDF5-DIAG"):
        assert noise not in job.output, job.output


# Every evaluation rewrites the whole file, as a copy first. The room left is for none of it, or for the
# copy but not for what is added to it.
@pytest.mark.parametrize("copies", [0, pytest.param(1.02, marks=pytest.mark.long)], ids=["none", "a copy"])
def test_a_disk_that_fills_up_costs_no_generation(disk, tiny_model, uninterrupted, copies):
    folder = disk.folder / "run"
    with Job(2, *arguments(tiny_model(**BIG), folder, MANY)) as job:
        job.wait_for("generation 2/")
        disk.leave(int(copies * (folder / "run.h5").stat().st_size))
        assert_ends_with_a_line(job, str(folder / "run.h5"), "No space left on device", "the same command")
    done = committed(folder)
    assert 2 <= done < GENERATIONS
    assert_same_run(folder, uninterrupted, done - 1)  # the last one's evaluation may not have fitted
    disk.grow()
    train(1, *arguments(tiny_model(**BIG), folder, GENERATIONS))
    assert_same_run(folder, uninterrupted, GENERATIONS)
    assert_same_model(folder, uninterrupted)
    assert not list(folder.glob("*.partial"))


@pytest.mark.long
@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_disk_too_full_for_the_tuned_model_keeps_the_run(disk, tiny_model, uninterrupted, part):
    settings = arguments(tiny_model(**BIG), disk.folder, GENERATIONS)
    run_file = (uninterrupted / "run.h5").stat().st_size
    weights = (uninterrupted / "model" / "model.safetensors").stat().st_size
    assert weights > 2 * run_file, "or the run itself does not fit"
    # The weights and two pages of configuration, but no tokenizer; or not even the weights.
    disk.leave(run_file + weights + (3 * PAGE if part == "tokenizer" else -PAGE))
    with Job(2, *settings) as job:
        job.wait_for(f"generation {GENERATIONS}/{GENERATIONS}")
        assert_ends_with_a_line(job, str(disk.folder / "model"), "No space left on device")
    assert not (disk.folder / "model").exists()
    assert_same_run(disk.folder, uninterrupted, GENERATIONS)
    disk.grow()
    train(1, *settings)
    assert_same_run(disk.folder, uninterrupted, GENERATIONS)
    assert_same_model(disk.folder, uninterrupted)
    assert not list(disk.folder.glob("*.partial"))


def test_a_disk_that_is_full_at_the_start_is_bad_input(disk, tiny_model):
    disk.leave(8 * PAGE)
    (line,) = refused(*arguments(tiny_model(), disk.folder / "run", GENERATIONS))
    assert line.startswith("run.directory: ")
    assert str(disk.folder / "run") in line and "No space left on device" in line
    assert not (disk.folder / "run").exists()


def test_a_checkpoint_that_does_not_fit_costs_no_generation(disk, tiny_model, uninterrupted):
    settings = arguments(tiny_model(**BIG), disk.folder, MANY, run__checkpoint_every=3, run__evaluate_every=0)
    with Job(2, *settings) as job:
        job.wait_for("generation 1/")
        disk.leave(20 * PAGE)
        assert_ends_with_a_line(job, "checkpoint-000003.safetensors", "No space left on device")
    assert committed(disk.folder) == 3
    assert_same_run(disk.folder, uninterrupted, 3)
    assert not list(disk.folder.glob("*.partial"))


def test_a_read_only_place_is_refused_before_anything_is_loaded(disk, tiny_model):
    disk.remount("ro")
    (line,) = refused(*arguments(tiny_model(), disk.folder / "run", GENERATIONS))
    assert line.startswith("run.directory: ") and str(disk.folder) in line
    with Job(2, *arguments(tiny_model(), disk.folder, GENERATIONS)) as job:
        assert job.end() == 2
    assert len(launching.problems(job.output)) == 1
    assert "loading" not in job.output


def test_a_run_in_a_read_only_place_is_not_gone_on_with(disk, tiny_model, uninterrupted):
    shutil.copy(uninterrupted / "run.h5", disk.folder)
    disk.remount("ro")
    (line,) = refused(*arguments(tiny_model(**BIG), disk.folder, MANY))
    assert line.startswith("run.directory: ") and str(disk.folder) in line


def test_a_directory_that_vanishes_ends_the_job(tmp_path, tiny_model):
    """As when a scratch file system is cleaned, or unmounted from this node."""
    folder = tmp_path / "run"
    with Job(2, *arguments(tiny_model(), folder, MANY)) as job:
        job.wait_for("generation 2/")
        folder.rename(tmp_path / "elsewhere")
        assert_ends_with_a_line(job, str(folder / "run.h5"), "removed")
    assert not folder.exists(), "and it is not made anew with half a run in it"
