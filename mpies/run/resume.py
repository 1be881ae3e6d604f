"""Going on with a run: find its file, check that it is the same run, bring the base to where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpies import config
from mpies.errors import InputError, reason
from mpies.model.saving import refuse_overwriting
from mpies.ranks.agreement import Brought, agree, keep_on_root
from mpies.ranks.collectives import named
from mpies.replica import Replica
from mpies.run import checkpoint, continuity
from mpies.run.replaying import replay
from mpies.runfile import History, RunFile
from mpies.text import clip

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

TUNED = "model"  # the tuned model's folder, in the run's


def find(comm: Comm, settings: config.Settings, path: Path) -> tuple[RunFile | None, History | None]:
    """The run file that is there, opened on rank 0, and its history, on every rank; else None, None.

    Raises RefusedError as `look` raises InputError. Collective.
    """
    return keep_on_root(comm, look, settings, path)


def look(settings: config.Settings, path: Path) -> tuple[RunFile | None, History | None]:
    """The run file that is there, opened, and its history; else None, None. For rank 0.

    Raises InputError when `run.resume` forbids what is there, the settings are another run's, the
    directory cannot be written to, or the tuned model would have no place in it.
    """
    try:
        _refuse_taken_folder(settings.model.path, path.parent / TUNED)
        if not _expected(settings.run.resume, path):
            return None, None
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise InputError(f"run.directory: {clip(str(path.parent))} cannot be ({reason(error)})") from None
    log = RunFile.reopen(path, settings.es.generations)
    history = log.history()
    config.refuse_changes(config.from_yaml(history.settings), settings)
    if history.generations > settings.es.generations:
        raise InputError(
            f"es.generations: given {settings.es.generations}, but the run file holds"
            f" {history.generations} already; python -m mpies.replay gives the weights of any of them"
        )
    return log, history


def _refuse_taken_folder(model: str, tuned: Path) -> None:
    """Raise InputError, now and not when all is done, if the tuned model could not be written."""
    if Path(model).expanduser().resolve() == tuned.resolve():
        raise InputError(
            f"run.directory: the tuned model goes to {tuned}, where the initial model is; choose another"
            " directory"
        )
    try:
        refuse_overwriting(tuned)
    except InputError as error:
        raise InputError(f"run.directory: the tuned model goes there, but {error}") from None


def restore(
    comm: Comm,
    replica: Replica,
    history: History,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Bring the initial base to the history's last generation: a checkpoint, then replay. Collective.

    Raises RefusedError when the initial model is not the run's, or when the result is not what the run
    file's digest says.
    """
    start, last = time.perf_counter(), history.generations
    continuity.refuse_other_model(history, replica.facts)
    if last == 0:
        return

    def bring() -> Brought[int]:
        weights = replica.weights
        first = checkpoint.restore(folder, weights, history.run_uuid, history.digest, last, say)
        (digest,) = replay(weights, history, first, last, anchor=replica.anchor)
        _refuse_other_digest(digest, history)
        return Brought(first, told=first)

    first, began = agree(comm, "checkpoints", bring)
    if len(set(began)) > 1:
        without = [rank for rank, generation in enumerate(began) if generation < max(began)]
        say(
            f"{named(comm, without)} cannot read checkpoint {max(began)} of run.directory, and had to replay"
            " more: with run.checkpoint_every, all nodes should see the directory"
        )
    origin = f"checkpoint {first}" if first else "the initial model"
    say(f"resuming after generation {last}, replayed from {origin} in {time.perf_counter() - start:.1f} s")


def _refuse_other_digest(digest: int, history: History) -> None:
    if digest != history.digest[-1]:
        raise InputError(
            f"run.directory: replaying {history.generations} generations gives digest {digest:016x}, not the"
            f" run file's {history.digest[-1]:016x}; python -m mpies.replay --verify tells where they part"
        )


def _expected(resume: str, path: Path) -> bool:
    """Is there a run file to go on with? Raises InputError if that is not what `run.resume` says."""
    if path.exists():
        if resume == "never":
            raise InputError(
                f"run.directory: {path} exists already; choose another directory, or run.resume=auto"
            )
        return True
    if resume == "must":
        raise InputError(f"run.resume: must, but there is no {path}")
    parent, names = path.parent, []
    while not parent.exists():
        names.append(parent.name)
        parent = parent.parent
    for name in names:  # of a name that cannot be, such as one too long, only this tells
        (parent / name).exists()
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"run.directory: cannot write to {parent}")
    return False
