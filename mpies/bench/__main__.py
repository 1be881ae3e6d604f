from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mpies
from mpies import bench
from mpies.bench import generation, kernels, report, vllm
from mpies.bench.generation import Subject, Work
from mpies.bench.report import Figure
from mpies.engines import vllm as vllm_engine
from mpies.model import loading
from mpies.noise import kernels_for
from mpies.noise.definition import CHUNK
from mpies.ranks import collectives, devices, launch, memory

PARTS = ("kernels", "vllm", "generation", "share", "memory", "scaling")
LONG = 64, 64  # prompts and tokens of a member, where the share of inference is measured


def options(arguments: list[str]) -> argparse.Namespace:
    description, _, epilog = bench.__doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m mpies.bench",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="quickstart", help="a model folder (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs that a median is of (%(default)s)")
    parser.add_argument("--members", type=int, default=32, help="of a generation (%(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="per member (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="per answer (%(default)s)")
    parser.add_argument("--size", type=int, default=2**25, help="parameters of the kernels' tensor")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args(arguments)


def main(comm, arguments: list[str]) -> int:
    given = options(arguments)
    torch.set_num_threads(given.threads)
    device = collectives.together(comm, devices.device_for, comm, given.device)
    dtype, _ = loading.choose_dtype(given.dtype, device)
    console = Console(stderr=True, quiet=comm.rank != 0)
    with console.status("...") as status:
        figures = list(measure(comm, given, device, dtype, lambda text: status.update(text)))
    if comm.rank == 0:
        facts = {
            "mpies": mpies.__version__,
            "machine": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "threads": given.threads,
            "ranks": comm.size,
            "model": given.model,
            "repeats": given.repeats,
            "torch": torch.__version__,
        }
        show(facts, figures)
        if given.json:
            rows = [{**asdict(figure), "verdict": figure.verdict} for figure in figures]
            given.json.write_text(json.dumps({"facts": facts, "figures": rows}, indent=1) + "\n")
    return 0


def measure(comm, given: argparse.Namespace, device: torch.device, dtype: torch.dtype, say):
    """The figures, part after part. Only scaling uses other ranks than rank 0."""

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    noise = kernels_for(device, given.threads)
    first = comm.rank == 0
    if "kernels" in given.only and first:
        size = max(8, given.size // CHUNK) * CHUNK
        timings = kernels.measure(noise, device, dtype, size, given.repeats, synchronize, say)
        yield from report.kernels(timings, 4 + dtype.itemsize)
    if "vllm" in given.only and first and vllm_engine.version():
        from mpi4py import MPI

        long, name = Work(given.members, *LONG), str(dtype).removeprefix("torch.")
        timings = vllm.measure(MPI.COMM_SELF, given, name, long, synchronize, say)
        yield from report.vllm(timings, long)
    rest = set(given.only) - {"kernels", "vllm"}
    if comm.size == 1:
        rest.discard("scaling")
    if not rest or not (first or "scaling" in rest):
        return
    subject = Subject(given.model, dtype, device, noise)
    work = Work(given.members, given.prompts, given.tokens)
    if "memory" in rest and first:
        yield from _memory(subject, device, work)
    if "generation" in rest and first:
        timings, phases = generation.compare(subject, work, given.repeats, synchronize, say)
        yield from report.generations(timings, phases, work, given.repeats + 1)
        yield from report.forecast(timings, phases, work, given.repeats + 1)
    if "share" in rest and first:
        long = Work(given.members, *LONG)
        yield from report.share(generation.share(subject, long, given.repeats, synchronize, say), long)
    if "scaling" in rest:
        timings = generation.scaling(subject, comm, work, given.repeats, synchronize, say)
        yield from report.scaling(timings, comm.size, work)


def _memory(subject: Subject, device: torch.device, work: Work):
    seeds = np.arange(1, work.members + 1, dtype=np.uint64)
    largest = max(base.numel() * 4 for base in subject.weights.base.values())
    subject.update(seeds, rank=1)  # what is compiled and loaded at the first call is not a member's
    subject.update(seeds, rank=0)
    calls = {
        "full: perturb": lambda: subject.weights.perturb(1, 0.01),
        "full: update and digest": lambda: subject.update(seeds, rank=0),
        "low rank: update and digest": lambda: subject.update(seeds, rank=1),
    }
    yield from report.memory({name: memory.beyond(device, call) for name, call in calls.items()}, largest)


def show(facts: dict, figures: list[Figure]) -> None:
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table("", "", "", "target", box=None, pad_edge=False)
    group = None
    for figure in figures:
        if figure.group != group:
            group = figure.group
            table.add_row(f"[bold]{group}")
        table.add_row(f"  {figure.name}", f"{figure.value:.4g}", figure.unit, figure.verdict)
    Console(width=max(Console().width, 110)).print(table)  # not to be folded in a log file


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        options(["--help"])
    launch.run(main, sys.argv[1:])
