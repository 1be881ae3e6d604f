"""Where compiled kernels are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mpies
from mpies.noise import compiling

DRAW = """
import torch
from mpies.model import lowrank_cpu
from mpies.noise.cpu import CpuKernels
print(CpuKernels(1).normal(3, [7], 1, 0, torch.device("cpu")).tolist())
"""


def draw(package: Path, temporary: Path, home: str) -> subprocess.CompletedProcess:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")},
        "PYTHONPATH": str(package.parent),
        "HOME": home,
        "XDG_CACHE_HOME": f"{home}/cache",
        "TMPDIR": str(temporary),
    }
    return subprocess.run(
        [sys.executable, "-c", DRAW],
        env=environment,
        cwd=temporary,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_installation_that_cannot_be_written_to_and_no_home(tmp_path):
    """Compiled code is kept all the same, where nobody else can put any."""
    package = shutil.copytree(
        Path(mpies.__file__).parent, tmp_path / "site" / "mpies", ignore=shutil.ignore_patterns("__pycache__")
    )
    for folder in ("noise", "model"):
        (package / folder / "__pycache__").touch()  # a file: not even root makes a folder of it
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ended = draw(package, temporary, "/dev/null")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("[[")
    (kept,) = temporary.iterdir()
    assert (kept.stat().st_mode & 0o777, kept.stat().st_uid) == (0o700, os.getuid())
    assert list(kept.rglob("*.nbi"))


def test_a_folder_that_somebody_else_may_write_to_is_not_used(tmp_path):
    """What is in it would be run."""
    first = compiling._private_folder(tmp_path)
    assert compiling._private_folder(tmp_path) == first
    first.chmod(0o777)
    other = compiling._private_folder(tmp_path)
    assert other != first and other.stat().st_mode & 0o777 == 0o700
    first.rmdir()
    first.symlink_to(other)
    assert compiling._private_folder(tmp_path) not in (first, other)
