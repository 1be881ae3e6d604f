"""Memory: what a rank needs on its device, reckoned before anything is loaded, and what is there."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpies.check.report import Finding
from mpies.config import Settings
from mpies.model import loading
from mpies.ranks import collectives, devices
from mpies.ranks.memory import available, free_on_node
from mpies.text import size

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Needed:
    """Bytes for the base weights, the live weights, and scratch: one tensor."""

    base: int
    live: int
    scratch: int
    file: int
    """Bytes of the model as its files hold it, and as every rank loads it."""

    @property
    def total(self) -> int:
        return self.base + self.live + self.scratch


def reckon(comm: Comm, settings: Settings) -> tuple[int, list[Finding]]:
    """Bytes there are for this rank, and whether the weights fit into them and on the disk.

    Raises RefusedError when the model's configuration cannot be read on a rank. What the engine's
    cache takes is measured later, when one member is evaluated.
    """
    needed = collectives.together(comm, weights_of, comm, settings)
    device = devices.device_for(comm, settings.model.device)
    there = available(comm, device)
    ranks = collectives.allgather_objects(comm, there)
    least = min(range(comm.size), key=ranks.__getitem__)
    value = (
        f"{size(needed.total)} a rank: base {size(needed.base)}, live {size(needed.live)}, largest tensor"
        f" {size(needed.scratch)}; {size(ranks[least])} there"
    )
    problem = ""
    if needed.total > ranks[least]:
        problem = (
            f"{collectives.named(comm, [least])} has {size(ranks[least])} of memory free, but needs"
            f" {size(needed.total)}: fewer ranks on a node, more memory (--mem, larger GPUs), or a"
            " smaller model"
        )
    findings = [Finding("memory", value, problem), *_loading(comm, settings, needed)]
    return there, [*findings, collectives.on_root(comm, _disk, settings, needed)]


def _loading(comm: Comm, settings: Settings, needed: Needed) -> list[Finding]:
    """On GPU nodes: the host's memory, into which all ranks of a node load the model at once. Collective."""
    if devices.device_for(comm, settings.model.device).type != "cuda":
        return []
    hosts = collectives.allgather_objects(comm, (collectives.host(), free_on_node()))
    sharers = Counter(host for host, _ in hosts)
    return [room_to_load(needed.file, {host: (sharers[host], free) for host, free in hosts})]


def room_to_load(copy: int, hosts: dict[str, tuple[int, int]]) -> Finding:
    """`copy`: bytes of the model as it is loaded; `hosts`: name -> (its ranks, its bytes of free memory)."""
    host = min(hosts, key=lambda name: hosts[name][1] - copy * hosts[name][0])
    ranks, free = hosts[host]
    value = f"{size(ranks * copy)} of {host}'s own memory while {ranks} rank(s) load, {size(free)} there"
    problem = ""
    if ranks * copy > free:
        problem = (
            f"{host} has {size(free)} of its own memory free, but {ranks} rank(s) that load the model at once"
            f" need {size(ranks * copy)}: more memory (--mem), fewer ranks on a node, or a smaller model"
        )
    return Finding("loading", value, problem)


def weights_of(comm: Comm, settings: Settings) -> Needed:
    """From the model's configuration alone."""
    device = devices.device_for(comm, settings.model.device)
    dtype, _ = loading.choose_dtype(settings.model.dtype, device)
    outline = loading.outline(settings.model.path, settings.model.allow_download)
    sizes = [parameter.numel() for parameter in outline.parameters()]  # tied ones once
    count, base = sum(sizes), loading.base_dtype(settings.model.master, dtype)
    stored = getattr(outline.config.dtype, "itemsize", FLOAT32)
    return Needed(base.itemsize * count, dtype.itemsize * count, FLOAT32 * max(sizes), stored * count)


def _disk(settings: Settings, needed: Needed) -> Finding:
    """Room for the tuned model and two checkpoints, or three: the newest is there before the oldest goes."""
    folder = Path(settings.run.directory).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    checkpoints = max(needed.live + 2 * needed.base, 3 * needed.base)
    wanted = checkpoints if settings.run.checkpoint_every else needed.live
    problem = ""
    if wanted > free:
        problem = f"run.directory: {size(free)} free in {folder}, but {size(wanted)} wanted: use another disk"
    return Finding("room", f"{size(wanted)} for the tuned model and checkpoints, {size(free)} free", problem)
