"""The run directory: whether a run can begin or go on there, and how its file system treats a run file."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpies.check.report import Finding
from mpies.config import Settings
from mpies.errors import InputError, StorageError, reason
from mpies.ranks import agreement, collectives
from mpies.run import resume
from mpies.runfile import RUN_FILE, TABLES, History, RunFile, open_for_reading
from mpies.text import duration, size

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

COMMITS = 5
SLOW_COMMIT = 1.0  # seconds
SHOWN_WITHIN = 10.0  # seconds that another node may take to see a file; NFS caches


def check_directory(comm: Comm, settings: Settings) -> tuple[History | None, list[Finding]]:
    """The run that the directory has already, and what a run file does there."""
    path = Path(settings.run.directory) / RUN_FILE
    log, history = resume.find(comm, settings, path)
    if log:
        log.close()
    probe = Path(agreement.on_root(comm, _probe_folder, path.parent))
    try:
        findings = _try_out(comm, settings, probe / RUN_FILE)
    finally:
        if comm.rank == 0:
            shutil.rmtree(probe, ignore_errors=True)
    begun = f"goes on after generation {history.generations}" if history else "a new run"
    return history, [Finding("directory", f"{path.parent}: {begun}"), *findings]


def _probe_folder(folder: Path) -> str:
    """A folder of our own beside the run, in the nearest folder above that exists."""
    while not folder.exists():
        folder = folder.parent
    try:
        return tempfile.mkdtemp(prefix=".mpies-check-", dir=folder.resolve())
    except OSError as error:
        raise InputError(f"run.directory: cannot write to {folder} ({reason(error)})") from None


def _try_out(comm: Comm, settings: Settings, path: Path) -> list[Finding]:
    """Write a run file on rank 0, as a run does; look at it from the last rank, maybe on another node."""
    log: RunFile | None = None

    def write() -> float:
        nonlocal log
        try:
            log = new_run_file(path, settings)
            return seconds_of_commit(log, settings.es.population)
        except StorageError as error:
            raise InputError(f"run.directory: {error}") from None

    seconds = agreement.on_root(comm, write)
    last = comm.rank == comm.size - 1
    seen, locked = collectives.allgather_objects(comm, (sees(path), kept_out(path)) if last else None)[-1]
    if log:
        log.close()
    free = agreement.on_root(comm, lambda: shutil.disk_usage(path.parent).free)
    slow = "a slow file system: every generation waits for it; a local or a scratch one may be faster"
    value = f"{file_system(path)}, {size(free)} free, {duration(seconds)} to commit a generation"
    findings = [Finding("disk", value, note=slow if seconds > SLOW_COMMIT else "")]
    if comm.size > 1:
        findings.append(_sharing(collectives.named(comm, [comm.size - 1]), seen, locked))
    return findings


def _sharing(other: str, seen: bool, locked: bool) -> Finding:
    note = ""
    if not seen:
        note = f"{other} does not see what rank 0 writes: put run.directory on a shared file system"
    elif not locked:
        note = (
            "locks do not reach other processes there, so that two jobs in one directory would not notice"
            " each other: have it mounted with locks (Lustre: -o flock), or take care"
        )
    words = f"{'seen' if seen else 'not seen'} by {other}, {'locked' if locked else 'not locked'} against it"
    return Finding("run file", words, note=note)


def new_run_file(path: Path, settings: Settings) -> RunFile:
    start = dict.fromkeys(("hosts", "devices", "versions", "rewards"), "") | {
        "world_size": 0,
        "reason": "check",
    }
    attributes = {"model_path": "", "model_digest": np.uint64(0), "parameters": 0, "dtype": ""}
    return RunFile.create(
        path, settings.to_yaml(), start, population=settings.es.population, generations=COMMITS, **attributes
    )


def seconds_of_commit(log: RunFile, population: int) -> float:
    """Mean seconds that a generation takes to be on disk."""
    row = {column.name: 0 for column in TABLES["generation"]}
    members = {column.name: np.zeros(population, column.dtype) for column in TABLES["member"]}
    start = time.perf_counter()
    for _ in range(COMMITS):
        log.append(row, members)
    return (time.perf_counter() - start) / COMMITS


def sees(path: Path) -> bool:
    """Does this rank read what rank 0 committed?"""
    deadline = time.monotonic() + SHOWN_WITHIN
    while time.monotonic() < deadline:
        try:
            with open_for_reading(path) as file:
                if file.attrs["generations_committed"] == COMMITS:
                    return True
        except (InputError, OSError):
            pass
        time.sleep(0.2)
    return False


def kept_out(path: Path) -> bool:
    """Does rank 0's lock keep this rank out?"""
    try:
        with open(path.with_name("run.lock"), "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a file system without locks
        return False
    return False


def file_system(path: Path) -> str:
    """The kind of file system, as /proc/mounts names it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    resolved = path.resolve()
    holding = [(len(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(holding)[1] if holding else "file system unknown"
