"""How much memory a rank can have, and how much a call takes at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def free_on_node() -> int:
    """Bytes that the node, and the control groups that this process is in, have left."""
    return min(_meminfo("MemAvailable"), *_left_in_cgroups(), 2**62)


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 2**62


def _left_in_cgroups() -> Iterator[int]:
    """limit - use of this process's memory control group and of those above; Slurm limits jobs so."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif controllers == "memory":
            root, limit, used = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from left(folder / limit, folder / used)


def left(limit: Path, used: Path) -> Iterator[int]:
    """limit - use, where there is a limit. The page cache is given back when needed, and not counted."""
    try:
        text = limit.read_text().strip()
        if text != "max":
            yield int(text) - int(used.read_text()) + _copies_of_files(used.with_name("memory.stat"))
    except (OSError, ValueError):
        return


def _copies_of_files(stat: Path) -> int:
    """Bytes of the page cache in a control group, those below it included, but for tmpfs."""
    if not stat.exists():
        return 0
    lines = dict(line.split() for line in stat.read_text().splitlines())
    prefix = "total_" if "total_active_file" in lines else ""  # the first version of control groups
    return sum(int(lines.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def measure_peak(device: torch.device, call: Callable[[], None]) -> int | None:
    """Bytes that a call needs at its peak beyond what is in use before it; None where nobody counts."""
    if device.type != "cpu":
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
