"""What a run loads, loaded on every rank as a run does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mpies.check.report import Finding
from mpies.config import Settings, remark
from mpies.model.loading import folder_of
from mpies.ranks.collectives import allgather_objects
from mpies.replica import InitialUse, Replica, Setup, load, settle
from mpies.run.continuity import refuse_other_model, refuse_other_run
from mpies.runfile import History
from mpies.text import duration, size

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def check_setup(comm: Comm, settings: Settings, history: History | None) -> tuple[Setup, list[Finding]]:
    """Software, devices, prompts, the reward function; that the history's run can go on with them."""
    setup = settle(comm, settings)
    task = setup.task
    if history:
        refuse_other_run(history, settings, setup)
        setup = setup.of_run(history)
    rows = f"{len(task.train)} training, {len(task.held_out)} held-out prompts"
    remarks = "; ".join(remark(settings))
    return setup, [Finding("task", f"{task.name}: {rows}", note=remarks)]


def weight_files(path: str) -> list[Path]:
    """That a start reads; of a model that was loaded before."""
    return list(Path(folder_of(path)).glob("*.safetensors"))


def tell_speed(read: int, seconds: float) -> str:
    """How long every rank takes to load so many bytes; ranks of a node share what is read from the disk."""
    return f"{size(read)} loaded in {duration(seconds)} on every rank, {size(read / seconds)}/s"


def check_model(
    comm: Comm, settings: Settings, setup: Setup, history: History | None
) -> tuple[tuple[Replica, float], list[Finding]]:
    """The replica, which has to be the history's, and the seconds that the slowest rank took to load it."""
    start = time.perf_counter()
    replica = load(comm, settings, setup, InitialUse.of_training(settings))
    seconds = max(allgather_objects(comm, time.perf_counter() - start))
    facts = replica.facts
    if history:
        refuse_other_model(history, facts)
    value = (
        f"{facts.model_name}, digest {facts.model_digest:016x}, live {facts.dtype} ({facts.dtype_reason});"
        f" {tell_speed(sum(file.stat().st_size for file in weight_files(settings.model.path)), seconds)}"
    )
    return (replica, seconds), [Finding("model", value)]
