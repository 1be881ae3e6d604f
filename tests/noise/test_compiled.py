"""The GPU's kernels as Triton compiles them: what their code holds, and, emulated, that its bits are right.

Without a GPU: `stand_in_gpu` takes its place. In a process for each GPU, since the tests of this one run the
kernels in Triton's interpreter, which is decided when they are imported.
"""

from __future__ import annotations

import os

import pytest
from apart import NEEDS_TRITON, run_tests

pytestmark = NEEDS_TRITON

# A100, H100, B200; MI300.
NVIDIA, AMD = ["sm_80", "sm_90", "sm_100"], ["gfx942"]
THOROUGH = NVIDIA if "MPIES_THOROUGH" in os.environ else ["sm_90"]


@pytest.mark.parametrize("gpu", NVIDIA)
def test_compiled_for_nvidia(gpu, triton_cache):
    """What is compiled; and all tests of noise and of low-rank products with it, in place of the kernels."""
    files = ["tests/noise/compiled"]
    if gpu in THOROUGH:
        files += ["tests/noise/test_noise.py", "tests/model/test_lowrank_gpu.py"]
    run_tests(gpu, triton_cache, *files, "-k", "gpu- or compiled or lowrank_gpu")


@pytest.mark.parametrize("gpu", AMD)
def test_compiled_for_amd(gpu, triton_cache):
    run_tests(gpu, triton_cache, "tests/noise/compiled/test_code.py")
