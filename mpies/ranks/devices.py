"""Which device is a rank's: by its number among the ranks of its node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpies.errors import InputError
from mpies.ranks.collectives import hosts

if TYPE_CHECKING:
    import torch
    from mpi4py.MPI import Comm


def local_rank(comm: Comm) -> tuple[int, int]:
    """This rank's number among the ranks on its node, and how many they are.

    By the names of their hosts: MPI's own split by node waits without end for a rank that hangs.
    """
    everyone = hosts(comm)
    mine = everyone[comm.rank]
    return everyone[: comm.rank].count(mine), everyone.count(mine)


def device_for(comm: Comm, setting: str) -> torch.device:
    """The rank's device: its node-local number modulo the visible GPUs, or the CPU.

    Slurm's --gpus-per-task shows each rank only its own GPU, as device 0: hence the modulo.
    Raises InputError when `cuda` is asked for and no GPU is visible.
    """
    import torch

    visible = torch.cuda.device_count() if setting != "cpu" else 0
    index, _ = local_rank(comm)
    if visible:
        return torch.device("cuda", index % visible)
    if setting == "cuda":
        raise InputError("model.device: cuda was asked for, but no GPU is visible; use cpu or auto")
    return torch.device("cpu")
