"""A live view of a job that is running elsewhere, from its run file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mpies.analyze import terminal
from mpies.analyze.run import Run, open_run, short_names
from mpies.analyze.summary import summarize
from mpies.errors import InputError
from mpies.text import duration

PATIENCE = 5  # looks at a file that cannot be read, before giving up
SELDOM = 4  # times as long as a look takes is the least pause before the next


def watch_run(
    path: Path, screen: Console, interval: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show the run every `interval` seconds until it is complete. On no terminal, a line per generation.

    Raises InputError if the file cannot be read: at first at once, later when that lasts.
    """
    if not screen.is_terminal:
        _lines(path, screen, interval, sleep)
        return
    with Live(console=screen, auto_refresh=False, transient=False) as live:
        for run in looks(path, interval, sleep):
            live.update(_view(run, screen), refresh=True)


def looks(path: Path, interval: float, sleep: Callable[[float], None]) -> Iterator[Run]:
    """The run, read anew every `interval` seconds, until it is complete.

    Reading and showing a file of gigabytes takes seconds: then it is looked at less often.
    """
    failures, begun = 0, time.monotonic()
    run = open_run(path)
    while True:
        yield run
        if is_complete(run):
            return
        sleep(max(interval, SELDOM * (time.monotonic() - begun)))
        begun = time.monotonic()
        try:
            run, failures = open_run(path), 0
        except InputError:
            failures += 1
            if failures == PATIENCE:
                raise


def is_complete(run: Run) -> bool:
    """Are all generations there, and the evaluation after the last?"""
    return run.committed >= run.target and run.target in run.tables["evaluation"]["generation"]


def seconds_left(run: Run) -> float:
    """Seconds that the missing generations take, by the median of the latest five, as the job itself says."""
    recent = run.column("generation/seconds")[-5:]
    return (run.target - run.committed) * float(np.median(recent)) if recent.size else 0.0


def _view(run: Run, screen: Console) -> Group:
    summary = summarize(run, short_names([run])[0])
    return Group(terminal.render_detail(run, summary, screen), Text(f"  {_state(run)}", style="bold"))


def _state(run: Run) -> str:
    ago = duration(max(0.0, time.time() - run.written))
    if is_complete(run):
        return "complete"
    if not run.committed:
        return f"no generation yet; last written {ago} ago (Ctrl-C leaves, the job goes on)"
    return f"{duration(seconds_left(run))} to go; last written {ago} ago (Ctrl-C leaves, the job goes on)"


def _lines(path: Path, screen: Console, interval: float, sleep: Callable[[float], None]) -> None:
    shown = None
    for run in looks(path, interval, sleep):
        first = max(0, run.committed - 1) if shown is None else shown
        for g in range(first, run.committed):
            screen.print(
                f"generation {g + 1}/{run.target}  reward {run.column('generation/reward_mean')[g]:.4g}"
                f"  {run.column('generation/seconds')[g]:.1f} s{_signal(run, g)}",
                markup=False,
            )
        shown = run.committed


def _signal(run: Run, generation: int) -> str:
    share = run.column("generation/pairs_with_signal")[generation]
    return f"  {100 * share:.0f} % of pairs with a signal" if share == share else ""
