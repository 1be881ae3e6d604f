"""Where each rank computes, and what memory it has there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpies.errors import InputError
from mpies.ranks.collectives import host, hosts
from mpies.ranks.memory import free_on_node

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class Place:
    """Where a rank computes."""

    host: str
    device: str
    """As PyTorch names it, with a GPU's model: 'cpu', 'cuda:0 NVIDIA H100'."""
    gpu: str | None
    """Which GPU it is, whatever number the rank has for it; None: a CPU."""
    free: int
    """Bytes that the GPU, or the node, had free."""


def place_of(device: torch.device) -> Place:
    """This rank's place, as it is now."""
    if device.type != "cuda":
        return Place(host(), str(device), None, free_on_node())
    name = f"{device} {torch.cuda.get_device_name(device)}"
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    return Place(host(), name, gpu, torch.cuda.mem_get_info(device)[0])


def shares(places: Sequence[Place]) -> list[int]:
    """Bytes that each rank can have: those who share a GPU, or a node's memory, have equal parts of it."""
    sharers = Counter((place.host, place.gpu) for place in places)
    return [place.free // sharers[place.host, place.gpu] for place in places]


def local_rank(comm: Comm) -> int:
    """This rank's number among the ranks on its node.

    By the names of their hosts: MPI's own split by node waits without end for a rank that hangs.
    """
    everyone = hosts(comm)
    return everyone[: comm.rank].count(everyone[comm.rank])


def device_for(comm: Comm, setting: str) -> torch.device:
    """The rank's device: its node-local number modulo the visible GPUs, or the CPU.

    Slurm's --gpus-per-task shows each rank only its own GPU, as device 0: hence the modulo.
    Raises InputError when `cuda` is asked for and no GPU is visible.
    """
    visible = torch.cuda.device_count() if setting != "cpu" else 0
    if visible:
        return torch.device("cuda", local_rank(comm) % visible)
    if setting == "cuda":
        raise InputError("model.device: cuda was asked for, but no GPU is visible; use cpu or auto")
    return torch.device("cpu")
