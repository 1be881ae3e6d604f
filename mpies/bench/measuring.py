"""The bench's parts, one after another, and the table of their figures."""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mpies
import mpies.engines.vllm
from mpies.bench import generation, kernels, multilora, one_turn, report, vllm, vllm_lowrank, waiting
from mpies.bench.generation import Rig, Work
from mpies.bench.report import Result
from mpies.model.loading import choose_dtype
from mpies.noise import kernels_for
from mpies.noise.definition import CHUNK
from mpies.ranks.agreement import together
from mpies.ranks.devices import device_for
from mpies.ranks.gpu import make_ready
from mpies.ranks.memory import measure_peak
from mpies.replica import synchronize

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

BLOCKS = 16  # of a rank, where waiting for a slow one is measured
LONG = 64, 64  # prompts and tokens of a member, where the share of inference is measured


def prepare(comm: Comm, given: argparse.Namespace) -> tuple[torch.device, str]:
    """The rank's device, made current, and the dtype of the live weights by name. Collective."""
    torch.set_num_threads(given.threads)
    device = together(comm, device_for, comm, given.device)
    together(comm, make_ready, device)
    dtype, _ = choose_dtype(given.dtype, device)
    return device, str(dtype).removeprefix("torch.")


def describe(comm: Comm, given: argparse.Namespace, device: torch.device, dtype: str) -> dict[str, Any]:
    """What was measured on."""
    return {
        "mpies": mpies.__version__,
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type != "cpu" else "cpu",
        "dtype": dtype,
        "threads": given.threads,
        "ranks": comm.size,
        "model": given.model,
        "repeats": given.repeats,
        "torch": torch.__version__,
    }


def measure(
    comm: Comm, given: argparse.Namespace, device: torch.device, dtype: str, say: Callable[[str], None]
) -> Iterator[Result]:
    """The figures, part after part. Only scaling uses other ranks than rank 0."""
    from mpi4py.MPI import COMM_SELF

    only, repeats, first = set(given.only), given.repeats, comm.rank == 0
    work, long = Work(given.members, given.prompts, given.tokens), Work(given.members, *LONG)

    def wait() -> None:
        synchronize(device)

    if "kernels" in only and first:
        size, live = max(8, given.size // CHUNK) * CHUNK, getattr(torch, dtype)
        noise = kernels_for(device, given.threads)
        timings = kernels.measure(noise, device, live, size, repeats, wait, say)
        yield from report.kernels(timings, 4 + live.itemsize)
    if "vllm" in only and first and mpies.engines.vllm.version():
        yield from report.vllm(vllm.measure(COMM_SELF, given, dtype, long, wait, say), long)
    if "vllm-lowrank" in only and first and mpies.engines.vllm.version():
        yield from _measure_blocks_in_vllm(given, dtype, work, wait, say)
    rest = only - {"kernels", "vllm", "vllm-lowrank"} - ({"scaling"} if comm.size == 1 else set())
    if not rest or not (first or "scaling" in rest):
        return
    rig = Rig(COMM_SELF, given, dtype, work)
    if "memory" in rest and first:
        yield from _measure_memory(rig, device, work)
    if "generation" in rest and first:
        timings, phases = generation.compare(rig, work, repeats, wait, say)
        yield from report.generations(timings, phases, work, repeats)
        yield from report.forecast(timings, phases, work, repeats, given.population, given.forecast)
    if "one-turn" in rest and first:
        yield from report.one_turn(one_turn.measure(rig, work, repeats, wait, say), work)
    if "share" in rest and first:
        yield from report.share(generation.share(rig, long, repeats, wait, say), long)
    if "scaling" in rest:
        yield from report.scaling(generation.scaling(rig, comm, work, repeats, wait, say), comm.size, work)
        shares = {dynamic: waiting.measure(comm, dynamic, BLOCKS, repeats).share for dynamic in (True, False)}
        yield from report.waiting(shares, comm.size, BLOCKS)


def _measure_blocks_in_vllm(
    given: argparse.Namespace,
    dtype: str,
    work: Work,
    wait: Callable[[], None],
    say: Callable[[str], None],
) -> Iterator[Result]:
    """Two vLLMs, one after the other: ours, and one with adapters."""
    from mpi4py.MPI import COMM_SELF

    repeats, large = given.repeats, vllm_lowrank.larger(work)
    gc.collect()  # a vLLM before this one
    rig = vllm_lowrank.rig_for(COMM_SELF, given, dtype, large)
    timings, phases = vllm_lowrank.compare(rig, work, repeats, wait, say)
    yield from report.vllm_blocks(timings, phases, work, repeats, least=88)
    yield from report.vllm_others(timings, work)
    much, phases = vllm_lowrank.against_vllm(rig, large, repeats, wait, say)
    yield from report.vllm_blocks(much, phases, large, repeats, least=92)
    subject = multilora.LoraBase.of(given.model, rig.original, vllm_lowrank.encode(rig, work))
    del rig
    yield from report.multilora(multilora.measure(subject, work, repeats, wait, say), timings, work)


def _measure_memory(rig: Rig, device: torch.device, work: Work) -> Iterator[Result]:
    seeds = np.arange(1, work.members + 1, dtype=np.uint64)
    largest = max(base.numel() * 4 for base in rig.weights.base.values())
    rig.update(seeds, rank=1)  # what is compiled and loaded at the first call is not a member's
    rig.update(seeds, rank=0)
    calls = {
        "full: perturb": lambda: rig.weights.perturb(1, 0.01),
        "full: update and digest": lambda: rig.update(seeds, rank=0),
        "low rank: update and digest": lambda: rig.update(seeds, rank=1),
    }
    yield from report.memory({name: measure_peak(device, call) for name, call in calls.items()}, largest)


def show(facts: dict[str, Any], figures: list[Result]) -> None:
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table("", "", "", "target", box=None, pad_edge=False)
    group = None
    for figure in figures:
        if figure.group != group:
            group = figure.group
            table.add_row(f"[bold]{group}")
        table.add_row(f"  {figure.name}", f"{figure.value:.4g}", figure.unit, figure.verdict)
    Console(width=max(Console().width, 110)).print(table)  # not to be folded in a log file
