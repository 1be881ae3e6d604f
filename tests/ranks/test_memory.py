"""What memory is left, and what a call takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpies.ranks import memory

MIB = 2**20
CPU = torch.device("cpu")


def test_what_is_free_is_no_more_than_the_machine_has():
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < memory.free_on_node() <= int(total.split()[1]) * 1024


@pytest.mark.skipif(memory.measure_peak(CPU, lambda: None) is None, reason="nobody counts here")
def test_a_peak_is_what_a_call_takes_at_its_highest():
    def call(*sizes: int) -> None:
        for size in sizes:
            np.ones(size, np.uint8)  # given back at once

    call(1)
    assert memory.measure_peak(CPU, lambda: call(64 * MIB)) == pytest.approx(64 * MIB, abs=20 * MIB)
    # Not the sum, nor what was the highest before.
    assert memory.measure_peak(CPU, lambda: call(64 * MIB, 128 * MIB, 32 * MIB)) == pytest.approx(
        128 * MIB, abs=32 * MIB
    )
    assert memory.measure_peak(CPU, lambda: None) < 20 * MIB
