"""These tests run batch jobs on a Slurm of their own: make test-slurm

They need root, Slurm's programs and munge, and are skipped elsewhere.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator

import launching
import pytest
from batch import Site
from cluster import Cluster, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with running() as slurm:
            yield slurm
    finally:
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
