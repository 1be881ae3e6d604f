"""Peak memory of perturbing and updating, beyond live and base weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def beyond(device: torch.device, call: Callable[[], None]) -> int | None:
    """Bytes that a call needs at its peak beyond what is in use before it; None where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
