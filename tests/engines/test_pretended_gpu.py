"""A rank's work on a GPU that is pretended, with its kernels emulated: see pretended/test_generations.py."""

from __future__ import annotations

import pytest
from apart import NEEDS_TRITON, run_tests
from torch.utils import backend_registration


@NEEDS_TRITON
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)
def test_pretended_gpu(tmp_path):
    run_tests("sm_90", tmp_path, "tests/engines/pretended")
