"""Agreement between ranks: what is bad on any is refused by all, and what differs between them is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from mpies.config.paths import make_absolute
from mpies.errors import InputError, RefusedError, show_traceback
from mpies.ranks.collectives import allgather_objects, allreduce_max, broadcast_object, named, set_timeout

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

    from mpies.config import Settings

T = TypeVar("T")
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Brought(Generic[T]):
    """What a rank brings to an agreement: a result of its own, facts that must be equal on all ranks, and
    what every rank is to know of it. The last two are small and picklable."""

    result: T
    same: dict[str, Any] = field(default_factory=dict)
    told: Any = None


def agree(
    comm: Comm,
    what: str,
    function: Callable[..., Brought[T]],
    *arguments: Any,
    timeout: float | None = None,
) -> tuple[T, list[Any]]:
    """Call the function on every rank: this rank's result, and what every rank has told.

    Raises RefusedError on all ranks if the function raises InputError on any, or if a fact differs; `what`
    names the facts. Raises MissingRankError if a rank takes `timeout` seconds (without it, the
    communicator's patience) longer than rank 0.
    """
    brought, problem = _attempt(function, *arguments)
    mine = (problem, brought.same, brought.told) if brought else (problem, {}, None)
    # Whether all is well is seen from a few numbers; who says what is only exchanged where it matters.
    alike, told = _compare(comm, mine, timeout)
    if not alike:
        everyone = allgather_objects(comm, mine)
        _refuse_problems(comm, [problem for problem, _, _ in everyone])
        _refuse_differences(comm, what, [same for _, same, _ in everyone])
    assert brought is not None
    return brought.result, allgather_objects(comm, brought.told) if told else [None] * comm.size


def _compare(
    comm: Comm, mine: tuple[str | None, dict[str, Any], Any], timeout: float | None
) -> tuple[bool, bool]:
    """Are all facts the same, without any problem, as a digest tells? Has any rank something to tell?"""
    problem, same, told = mine
    text = repr(sorted(same.items())).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), dtype=np.uint64)
    words = np.array([problem is not None, told is not None], dtype=np.uint64)
    # The smallest is the complement of the largest complement.
    largest = allreduce_max(comm, np.concatenate([words, digest, ~digest]), timeout=timeout)
    alike = np.array_equal(largest[2:6], ~largest[6:])
    return bool(alike and not largest[0]), bool(largest[1])


def together(comm: Comm, function: Callable[..., T], *arguments: Any, timeout: float | None = None) -> T:
    """Call the function on every rank; bad input on any of them is refused by all of them. As `agree`."""
    result, _ = agree(comm, "", lambda: Brought(function(*arguments)), timeout=timeout)
    return result


def on_root(comm: Comm, function: Callable[..., T], *arguments: Any) -> T:
    """Call the function on rank 0 only and return its (small) result everywhere."""
    _, result = keep_on_root(comm, lambda: (None, function(*arguments)))
    return result


def keep_on_root(
    comm: Comm, function: Callable[..., tuple[Kept, T]], *arguments: Any
) -> tuple[Kept | None, T]:
    """Call the function on rank 0 only: what is kept there, else None, and its (small) result everywhere."""
    brought, problem = _attempt(function, *arguments) if comm.rank == 0 else (None, None)
    kept, result = brought or (None, None)
    result, problem = broadcast_object(comm, (result, problem))
    if problem:
        raise RefusedError(problem)
    return kept, result


def require_equal(comm: Comm, facts: dict[str, Any], what: str) -> None:
    """Refuse to go on when any of the facts differs between ranks, naming the ranks that differ."""
    agree(comm, what, lambda: Brought(None, facts))


def agree_on_settings(comm: Comm, load: Callable[..., Settings], *arguments: Any) -> Settings:
    """The settings that `load` reads on every rank, equal on all; ranks are now as patient as they say.

    Their paths are absolute, by the folder that each rank is in.
    """

    def read() -> Brought[Settings]:
        settings = load(*arguments)
        return Brought(settings, settings.flat())

    settings, _ = agree(comm, "settings", read)
    settings = make_absolute(settings)
    set_timeout(comm, settings.run.collective_timeout)
    return settings


def find_diverged(digests: list[int]) -> list[int]:
    """The ranks whose digest is not the most frequent one (of equally frequent ones, the first)."""
    votes = {digest: digests.count(digest) for digest in digests}
    best = max(votes.values())
    truth = next(d for d in digests if votes[d] == best)
    return [rank for rank, digest in enumerate(digests) if digest != truth]


def _attempt(function: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """The function's result, or what it says of bad input."""
    try:
        return function(*arguments), None
    except InputError as error:
        show_traceback(error)
        return None, str(error)


def _refuse_problems(comm: Comm, problems: list[str | None]) -> None:
    first = next((rank for rank, text in enumerate(problems) if text), None)
    if first is not None:
        alone = "" if len(set(problems)) == 1 else f"{named(comm, [first])}: "
        raise RefusedError(f"{alone}{problems[first]}")


def _refuse_differences(comm: Comm, what: str, everyone: list[dict[str, Any]]) -> None:
    first = everyone[0]
    for key in sorted(set().union(*everyone)):
        differing = [rank for rank, theirs in enumerate(everyone) if theirs.get(key) != first.get(key)]
        if differing:
            raise RefusedError(
                f"{what} differ between ranks: {key} is {first.get(key)!r} on {named(comm, [0])} and"
                f" {everyone[differing[0]].get(key)!r} on {named(comm, differing)}"
            )
