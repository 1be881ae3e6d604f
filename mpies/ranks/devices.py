"""Where each rank computes, and what memory it has there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpies.errors import InputError
from mpies.ranks import gpu
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
    model: str = ""
    """Of a GPU: what matrix products may depend on."""


def place_of(device: torch.device) -> Place:
    """This rank's place, as it is now."""
    if device.type == "cpu":
        return Place(host(), str(device), None, free_on_node())
    found = torch.cuda.get_device_properties(device)
    name, model = f"{device} {found.name}", f"{found.name}, {found.multi_processor_count} multiprocessors"
    return Place(host(), name, str(found.uuid), torch.cuda.mem_get_info(device)[0], model)


def shares(places: Sequence[Place]) -> list[int]:
    """Bytes that each rank can have: those who share a GPU, or a node's memory, have equal parts of it."""
    sharers = Counter((place.host, place.gpu) for place in places)
    return [place.free // sharers[place.host, place.gpu] for place in places]


def tell_differing_gpus(places: Sequence[Place]) -> str:
    """A note, if the ranks' GPUs are not of one model: '' otherwise."""
    ranks: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place.model, []).append(rank)
    if len(ranks) < 2:
        return ""
    told = "; ".join(f"{len(those)} rank(s), the first {those[0]}: {model}" for model, those in ranks.items())
    return (
        f"the ranks' GPUs differ ({told}): matrix products may round differently on them, so a member's"
        " reward depends on which rank evaluates it; for runs that can be repeated, ask for one model"
    )


def local_rank(comm: Comm) -> int:
    """This rank's number among the ranks on its node.

    By the names of their hosts: MPI's own split by node waits without end for a rank that hangs.
    """
    everyone = hosts(comm)
    return everyone[: comm.rank].count(everyone[comm.rank])


def device_for(comm: Comm, setting: str) -> torch.device:
    """The rank's device: its node-local number modulo the visible GPUs, or the CPU.

    Slurm's --gpus-per-task shows each rank only its own GPU, as device 0: hence the modulo.
    Raises InputError when `cuda` is asked for and no GPU is visible, and when torch cannot use one.
    """
    visible = gpu.count_visible() if setting != "cpu" else 0
    if visible:
        return torch.device(gpu.KIND, local_rank(comm) % visible)
    if setting == "cuda":
        raise InputError("model.device: cuda was asked for, but no GPU is visible; use cpu or auto")
    return torch.device("cpu")
