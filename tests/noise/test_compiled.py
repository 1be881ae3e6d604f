"""The GPU's kernels as Triton compiles them: what their code holds, and, emulated, that its bits are right.

Without a GPU: `stand_in_gpu` takes its place. In a process for each GPU, since the tests of this one run the
kernels in Triton's interpreter, which is decided when they are imported.
"""

from __future__ import annotations

import os

import pytest
from apart import NEEDS_TRITON, run_tests

pytestmark = [pytest.mark.lengthy, NEEDS_TRITON]

# H100; A100, B200, MI300 take a minute each, and are tried by `make test-aot`.
GPUS = ["sm_90"]
if "MPIES_THOROUGH" in os.environ:
    GPUS += ["sm_80", "sm_100", "gfx942"]
# Without an emulator, AMD's code is looked through only.
CODE = ["tests/noise/compiled/test_code.py"]
ALL = ["tests/noise/compiled", "tests/noise/test_noise.py", "tests/model/test_lowrank_gpu.py"]


@pytest.mark.parametrize("gpu", GPUS)
def test_compiled(gpu, triton_cache):
    """What is compiled; and all tests of noise and of low-rank products with it, in place of the kernels."""
    files = ALL if gpu.startswith("sm_") else CODE
    run_tests(gpu, triton_cache, *files, "-k", "gpu- or compiled or lowrank_gpu")
