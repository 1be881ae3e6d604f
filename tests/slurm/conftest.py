"""These tests run batch jobs on a Slurm of their own: make test-slurm

They need root, Slurm's programs and munge, and are skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
from batch import Site
from cluster import Cluster, missing


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid():
        return "a Slurm of our own needs root"
    if missing():
        return f"Slurm is not installed ({', '.join(missing())}): apt install slurm-wlm munge"
    if not Path("/sys/fs/cgroup").is_mount():
        return "slurmd does not start without control groups: mount /sys/fs/cgroup"
    return ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why_not():
        pytest.skip(why_not())
    before = signal.signal(signal.SIGTERM, _interrupt)
    slurm = Cluster(Path(tempfile.mkdtemp(prefix="mpies-slurm-")))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_) -> None:
    """Time-outs from outside send SIGTERM: as Ctrl-C, it lets the cluster be taken down."""
    raise KeyboardInterrupt


@pytest.fixture
def site(cluster, tmp_path) -> Iterator[Site]:
    """Whatever jobs a test leaves are cancelled after it."""
    shutil.copytree(launching.REPOSITORY / "jobs", tmp_path / "jobs")
    yield Site(cluster, tmp_path)
    cluster.command("scancel", "--user=root")
    deadline = time.monotonic() + 30
    while cluster.command("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.3)
