"""A rank's work on a GPU that is pretended, with its kernels emulated: see pretended/test_generations.py."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from apart import run_tests

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


def test_pretended_gpu(tmp_path):
    run_tests("sm_90", tmp_path, "tests/engines/pretended")
