"""Tests of the compiled kernels are for processes of their own: ../test_compiled.py starts them."""

from __future__ import annotations

import os

if "MPIES_STAND_IN_GPU" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
