"""What is evaluated: a model, or one generation of a run, with the settings that it brings along."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpies import config
from mpies.errors import InputError, reason
from mpies.ranks.agreement import agree_on_settings, on_root
from mpies.run import inputs
from mpies.run.continuity import changed_rewards
from mpies.run.replaying import which_generation
from mpies.runfile import RUN_FILE, History, RunFile, read_history, refuse_unknown
from mpies.text import clip

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


@dataclass(frozen=True)
class EvaluatedRun:
    """The run of which a generation is evaluated."""

    path: Path
    """The run file."""
    history: History
    """Up to the generation."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, or one generation of a run."""

    settings: config.Settings
    run: EvaluatedRun | None = None

    @property
    def generation(self) -> int | None:
        return self.run.history.generations if self.run else None


def open_subject(comm: Comm, options: argparse.Namespace) -> tuple[RunFile | None, Subject]:
    """What is evaluated; with --log also the run file, on rank 0, locked against other jobs. Collective."""
    log: RunFile | None = None

    def look() -> EvaluatedRun | None:
        nonlocal log
        path = find_run_file(options.subject)
        if path is None:
            return None
        history = read_history(path)
        refuse_unknown(path, history)
        if options.log:
            log = open_locked(path, history)
            history = log.history()
        return EvaluatedRun(path, history.first(which_generation(options.generation, history)))

    run = on_root(comm, look)
    history = run.history if run else None
    settings = agree_on_settings(comm, lambda: inputs.require(settings_of(options, history)))
    return log, Subject(settings, run)


def find_run_file(subject: str) -> Path | None:
    """The run file that is meant; None if it is a model."""
    path = Path(subject).expanduser()
    try:
        if (path / RUN_FILE).is_file() and not (path / "config.json").exists():
            return path / RUN_FILE
    except OSError as error:  # a name that is too long
        raise InputError(f"{clip(subject)}: cannot be ({reason(error)})") from None
    # What is called so must be there; a hub id is called otherwise.
    return path if path.is_file() or path.suffix in (".h5", ".hdf5") else None


def open_locked(path: Path, history: History) -> RunFile:
    """The run file, to be written to."""
    try:
        return RunFile.reopen(path, history.generations)
    except InputError as error:
        raise InputError(f"--log: {error}; leave it out, or wait until that job has ended") from None


def settings_of(options: argparse.Namespace, history: History | None) -> config.Settings:
    """The run's settings, or the configuration file's, with overrides. Raises InputError."""
    if history is None:
        for name in ("generation", "log"):
            if getattr(options, name):
                raise InputError(f"--{name}: {options.subject} is no run file, which this is for")
        if (options.kl or options.drift) and not options.initial:
            raise InputError("--kl and --drift: name the model to compare with, by --initial MODEL")
        return config.load([*options.settings, f"model.path={options.subject}", "run.directory=."])
    if options.log and options.initial:
        raise InputError(
            "--log: a run file tells how far its run is from its own initial model; leave out --initial or it"
        )
    for given in options.settings:
        if "=" not in given:
            raise InputError(f"{given}: a run has its own settings; give section.key=value to change one")
        if given.startswith(("es.", "model.master=")):
            raise InputError(f"{given}: what has made the run's weights cannot be changed; leave it out")
    _refuse_relative_paths(config.from_yaml(history.settings), options.settings)
    return config.from_yaml(history.settings, [f"model.dtype={history.dtype}", *options.settings])


def _refuse_relative_paths(recorded: config.Settings, overrides: list[str]) -> None:
    """Raise InputError if it is not known which file an earlier version's run file means.

    What lies under that path here may be another file, whose code would run.
    """
    for key, path in config.relative_paths(recorded).items():
        if not any(given.startswith(f"{key}=") for given in overrides):
            raise InputError(
                f"{key}: the run file says {path}, but not in which folder; name it: {key}=/path/to/{path}"
            )


def answers_as_trained(settings: config.Settings, history: History, reward_digests: dict[str, str]) -> bool:
    """Are answers found and scored as the run itself does, so that figures can stand beside its own?

    `reward_digests`: SHA-256 of the reward functions' files, by the functions' names.
    """
    own, now = config.comparable(config.from_yaml(history.settings)), config.comparable(settings)
    decisive = [key for key in now if key.startswith(("task.", "engine.")) and key not in config.CHANGEABLE]
    same = all(now[key] == own[key] for key in [*decisive, "run.threads"])
    return same and settings.model.dtype == history.dtype and not changed_rewards(history, reward_digests)
