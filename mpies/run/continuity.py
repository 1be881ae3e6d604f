"""What stays while a run goes on: its model, its data, its rewards, its dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpies import config
from mpies.errors import RefusedError
from mpies.es import schedule
from mpies.runfile import History

if TYPE_CHECKING:
    from mpies.replica import Facts, Setup

FOR_OTHER_DATA = "for other data, begin a new run in another run.directory"
FOR_OTHER_REWARDS = (
    "put that file back; or begin a new run in another run.directory; or, knowing that rewards before and"
    " after are not alike, go on with run.changed_reward=accept"
)


def changed_rewards(history: History, digests: dict[str, str]) -> dict[str, str]:
    """Of the reward functions whose files have these SHA-256, by name: those that had another, and which.

    A file may lie elsewhere now. Of runs that earlier versions began, none is known.
    """
    before = {config.short_name(name): digest for name, digest in history.reward_digests.items()}
    known = {name: before.get(config.short_name(name), digest) for name, digest in digests.items()}
    return {name: known[name] for name, digest in digests.items() if known[name] != digest}


def remark_on_schedule(history: History, es: config.EsSettings) -> str:
    """What to say if the run's last alpha is not that of the schedule now: with more generations, a linear or
    cosine one is stretched, and alpha jumps."""
    if not 0 < history.generations < es.generations:
        return ""
    had = float(history.alpha[-1])
    if had == schedule.step(es, history.generations - 1).alpha:
        return ""
    goes_on = schedule.step(es, history.generations).alpha
    return (
        f"es.generations: es.alpha_schedule={es.alpha_schedule} is stretched to {es.generations} generations,"
        f" so that alpha goes on with {goes_on:g}, where it was {had:g}"
    )


def refuse_other_run(history: History, settings: config.Settings, setup: Setup) -> None:
    """Raise RefusedError if a run cannot go on with what is settled before the model is loaded."""
    refuse_other_data(history, setup.task.digest)
    if settings.run.changed_reward == "refuse":
        refuse_other_rewards(history, setup.reward_digests)
    refuse_other_dtype(history, str(setup.dtype).removeprefix("torch."))


def refuse_other_model(history: History, facts: Facts) -> None:
    """Raise RefusedError if the weights that were loaded are not the run's initial ones."""
    if facts.model_digest != history.model_digest:
        raise RefusedError(
            f"model.path: {facts.model_path} has digest {facts.model_digest:016x}, but the run"
            f" began with {history.model_digest:016x}: another model, or a changed one"
        )


def refuse_other_rewards(history: History, digests: dict[str, str], remedy: str = FOR_OTHER_REWARDS) -> None:
    """Raise RefusedError if a reward function's file is not what the run went on with last."""
    for name, known in changed_rewards(history, digests).items():
        raise RefusedError(
            f"task.reward: the file of {name} has SHA-256 {digests[name][:16]}, but that of the run had"
            f" {known[:16]}: {remedy}"
        )


def refuse_other_data(history: History, digest: str, remedy: str = FOR_OTHER_DATA) -> None:
    """Raise RefusedError if the task's data are not those that the run began with."""
    if history.data_digest not in ("", digest):  # none in files of earlier versions
        raise RefusedError(
            f"task.train_data: the data, held-out ones included, have digest {digest[:16]}, but the run"
            f" began with {history.data_digest[:16]}; {remedy}"
        )


def refuse_other_dtype(history: History, dtype: str) -> None:
    """Raise RefusedError if the live weights would be in another dtype than the run's."""
    if dtype != history.dtype:
        raise RefusedError(
            f"model.dtype: the run was begun with {history.dtype}, but here it would be {dtype}; set"
            f" model.dtype={history.dtype}"
        )
