"""Memory: what a rank needs on its device, reckoned before anything is loaded, and what is there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpies.check.report import Finding
from mpies.config import Settings
from mpies.engines.membertest import MEMBERS, packs_of_kinds
from mpies.engines.unused import AUTO
from mpies.model import loading
from mpies.model.beside import beside_decoder
from mpies.model.lowrank import count_noise
from mpies.model.lowrank_ways import count_in_turn
from mpies.model.storage import scratch_bytes
from mpies.ranks.agreement import on_root, together
from mpies.ranks.collectives import allgather_objects, host, named
from mpies.ranks.devices import shares
from mpies.ranks.memory import free_on_node
from mpies.replica import Setup
from mpies.text import duration, size

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

Parameters = Mapping[str, torch.Tensor]  # by name; of an outline, without memory

FLOAT32 = 4  # bytes
COPYING = 25e9  # bytes a second from the host's memory to a GPU, by PCIe 4 or 5; where none was measured


@dataclass(frozen=True)
class Needed:
    """Bytes for the base weights, the live weights, and scratch: a tensor, a member's turn, two buffers.

    What is not tuned has live weights, and a base only while the model is loaded.
    """

    base: int
    live: int
    scratch: int
    noise: int
    """Bytes of a block's noise of low rank: 0 with full noise."""
    start: int
    """Before the first generation, instead of scratch and noise: the base of what is not tuned, then what the
    self-test makes."""
    file: int
    """Bytes of the model as its files hold it, and as every rank loads it."""
    loaded: int
    """Bytes of the base while the model is loaded."""
    streamed: bool = False
    """Is the base in the host's memory, beside a GPU?"""

    @property
    def total(self) -> int:
        """On the device, at most."""
        beside = max(self.scratch + self.noise, self.start)
        return (0 if self.streamed else self.base) + self.live + beside

    @property
    def on_host(self) -> int:
        """Of a GPU's host, while the model is loaded."""
        return self.file + (self.loaded if self.streamed else 0)


def check_memory(comm: Comm, settings: Settings, setup: Setup) -> list[Finding]:
    """Do the weights fit into what every rank can have, and on the disk?

    Raises RefusedError when the model's configuration cannot be read on a rank. What the engine's
    cache takes is measured later, when one member is evaluated.
    """
    gpu = setup.device.type != "cpu"
    needed, left_out = together(comm, _reckon, settings, setup, gpu)
    ranks = shares(setup.places)
    least = min(range(comm.size), key=ranks.__getitem__)
    noise = f", noise of a block {size(needed.noise)}" if needed.noise else ""
    if needed.start > needed.scratch + needed.noise:
        noise += f"; before the first generation, {size(needed.start)} instead of scratch and noise"
    base = "" if needed.streamed else f"base {size(needed.base)}, "
    value = (
        f"{size(needed.total)} a rank: {base}live {size(needed.live)}, scratch {size(needed.scratch)}{noise};"
        f" {size(ranks[least])} there{_tell_streaming(needed)}"
    )
    problem = ""
    if needed.total > ranks[least]:
        remedy = propose_host(settings, setup.dtype, ranks[least], left_out) if gpu else ""
        problem = (
            f"{named(comm, [least])} has {size(ranks[least])} of memory free, but needs"
            f" {size(needed.total)}: {remedy}fewer"
            " ranks on a node, more memory (--mem, larger GPUs), or a"
            f" smaller {'es.block or model' if needed.noise else 'model'}"
        )
    findings = [Finding("memory", value, problem)]
    if gpu:
        findings.append(_check_loading(comm, needed))
    return [*findings, on_root(comm, _check_disk, settings, needed)]


def _reckon(settings: Settings, setup: Setup, gpu: bool) -> tuple[Needed, tuple[str, ...]]:
    """What is needed, and what is not tuned. Raises InputError."""
    left_out = setup.leaves_out(settings)
    return reckon_weights(settings, setup.dtype, gpu, left_out, setup.model_class), left_out


def _tell_streaming(needed: Needed) -> str:
    if not needed.streamed:
        return ""
    seconds = duration(needed.base / COPYING)
    return (
        f"; the base, {size(needed.base)} of the host's memory, is copied in some {seconds}, for every member"
    )


def propose_host(settings: Settings, dtype: torch.dtype, there: int, left_out: tuple[str, ...] = ()) -> str:
    """The base in the host's memory, if that would help: words to begin a remedy with."""
    if settings.model.base == "host":
        return ""
    model = settings.model.model_copy(update={"base": "host"})
    needed = reckon_weights(settings.model_copy(update={"model": model}), dtype, True, left_out)
    if needed.total > there:
        return ""
    seconds = duration(needed.base / COPYING)
    return f"model.base=host, which needs {size(needed.total)} and some {seconds} more a member, or "


def _check_loading(comm: Comm, needed: Needed) -> Finding:
    """On GPU nodes: the host's memory, into which all ranks of a node load the model at once. Collective."""
    hosts = allgather_objects(comm, (host(), free_on_node()))
    sharers = Counter(name for name, _ in hosts)
    return room_to_load(needed.on_host, {name: (sharers[name], free) for name, free in hosts})


def room_to_load(copy: int, hosts: dict[str, tuple[int, int]]) -> Finding:
    """`copy`: bytes that a rank needs of it; `hosts`: name -> (its ranks, its bytes of free memory)."""
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


def reckon_weights(
    settings: Settings,
    dtype: torch.dtype,
    gpu: bool = False,
    left_out: tuple[str, ...] = (),
    model_class: str | None = None,
) -> Needed:
    """From the model's configuration alone; `gpu`: for a rank that computes on one.

    `left_out`: as `Setup.leaves_out` says. What no answer depends on is all that is beside the decoder.
    `model_class`: as `loading.load` has it.
    """
    outline = loading.outline(settings.model.path, settings.model.allow_download, model_class)
    lowrank, streamed = settings.es.perturbation == "lowrank", gpu and settings.model.base == "host"
    everything = dict(outline.named_parameters())  # tied ones once
    tuned = _tuned(outline, everything, left_out)
    base = loading.base_dtype(settings.model.master, dtype)
    # A module's own weights of one member, and the noise that they are made with.
    turn = 2 * count_in_turn(outline, tuned) if lowrank else 0
    a_member = count_noise((p.shape for p in tuned.values()), settings.es.rank) if lowrank else 0
    loaded, kept = _count(everything), _count(tuned)
    loading_takes = _scratch(everything, base, streamed)
    if not streamed:
        loading_takes += base.itemsize * (loaded - kept)
    # The self-test of the hf engine computes with the base, too, where there is room for it.
    dtypes = [dtype] if dtype == torch.float32 or streamed else [dtype, base]
    tested = dtypes if lowrank and settings.engine.name == "hf" else []
    tests = [_test_takes(outline, tuned, a_member, turn, one) for one in tested]
    return Needed(
        base=base.itemsize * kept,
        live=dtype.itemsize * loaded,
        scratch=max(_scratch(tuned, base, streamed), dtype.itemsize * turn),
        noise=dtype.itemsize * settings.es.block_size * a_member,
        start=max(loading_takes, *tests, 0),
        file=getattr(outline.config.dtype, "itemsize", FLOAT32) * loaded,
        loaded=base.itemsize * loaded,
        streamed=streamed,
    )


def _tuned(outline: torch.nn.Module, everything: Parameters, left_out: tuple[str, ...]) -> Parameters:
    paths = [path for path in left_out if path != AUTO]
    paths += beside_decoder(outline) if AUTO in left_out else []
    return {
        name: parameter
        for name, parameter in everything.items()
        if not any(name == path or name.startswith(f"{path}.") for path in paths)
    }


def _count(parameters: Parameters) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _scratch(parameters: Parameters, base: torch.dtype, streamed: bool) -> int:
    return scratch_bytes([parameter.numel() for parameter in parameters.values()], base, streamed)


def _test_takes(
    outline: torch.nn.Module, tuned: Parameters, a_member: int, turn: int, dtype: torch.dtype
) -> int:
    """Bytes of the self-test of low rank: a block of two members, then own weights of one, kind by kind."""
    block = dtype.itemsize * (len(MEMBERS) * a_member + turn)
    packs = packs_of_kinds(outline, tuned)
    own = dtype.itemsize * max(sum(tuned[name].numel() for name in pack) for pack in packs)
    # Each is made in float32 first.
    widened = FLOAT32 * max(p.numel() for p in tuned.values()) if dtype.itemsize < FLOAT32 else 0
    return max(block, own + widened)


def _check_disk(settings: Settings, needed: Needed) -> Finding:
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
