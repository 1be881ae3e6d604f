"""Tests on a pretended GPU are for a process of their own: ../test_pretended_gpu.py starts it."""

from __future__ import annotations

import os

if "MPIES_STAND_IN_GPU" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    import pretended_gpu
    from triton.runtime import driver

    from mpies.model import lowrank_block

    pretended_gpu.install()
    driver.active.takes_cpu = False
    lowrank_block.FUSED_ON.add(pretended_gpu.DEVICE.type)
