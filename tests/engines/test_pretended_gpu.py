"""A rank's work on a GPU that is pretended, with its kernels emulated: see pretended/."""

from __future__ import annotations

import pytest
from apart import NEEDS_TRITON, run_tests
from torch.utils import backend_registration

pytestmark = pytest.mark.lengthy


@NEEDS_TRITON
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)
def test_pretended_gpu(triton_cache):
    run_tests("sm_90", triton_cache, "tests/engines/pretended")
