"""Tests that need a process of their own, in which Triton compiles, and something stands in for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launching import REPOSITORY


def run_tests(gpu: str, cache: Path, *arguments: str) -> None:
    """Run pytest with these arguments; what is compiled is kept in `cache`. Fails if a test does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"MPIES_STAND_IN_GPU": gpu, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
