"""The GPU's kernels as Triton compiles them: what their code holds, and, emulated, that its bits are right.

Without a GPU: `stand_in_gpu` takes its place. In a process for each GPU, since the tests of this one run the
kernels in Triton's interpreter, which is decided when they are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from launching import REPOSITORY

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")

TESTS = REPOSITORY / "tests/noise"
# A100, H100, B200; MI300.
NVIDIA, AMD = ["sm_80", "sm_90", "sm_100"], ["gfx942"]


def run_tests(gpu: str, cache, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"MPIES_STAND_IN_GPU": gpu, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("gpu", NVIDIA)
def test_compiled_for_nvidia(gpu, tmp_path):
    """All tests of noise, with what is compiled in place of the kernels."""
    run_tests(gpu, tmp_path, "tests/noise/test_noise.py", "tests/noise/compiled", "-k", "gpu- or compiled")


@pytest.mark.parametrize("gpu", AMD)
def test_compiled_for_amd(gpu, tmp_path):
    run_tests(gpu, tmp_path, "tests/noise/compiled/test_code.py")
