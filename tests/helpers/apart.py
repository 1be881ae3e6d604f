"""Tests that need a process of their own, in which Triton compiles, and something stands in for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import REPOSITORY


def knows_triton() -> bool:
    """Is there a Triton whose driver and PTX the stand-in and the emulator know?"""
    if not find_spec("triton"):
        return False
    return tuple(int(part) for part in metadata.version("triton").split(".")[:2]) >= (3, 7)


NEEDS_TRITON = pytest.mark.skipif(not knows_triton(), reason="Triton 3.7 or newer is not installed")


def run_tests(gpu: str, cache: Path, *arguments: str) -> None:
    """Run pytest with these arguments; what is compiled is kept in `cache`. Fails if a test does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"MPIES_STAND_IN_GPU": gpu, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
