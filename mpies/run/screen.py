"""What rank 0 shows: the banner, the progress of generations, answers before and after.

On a terminal, a progress bar; otherwise a plain line per generation, flushed. A launcher passes its
ranks' output through a pipe, so the terminal is looked for at the launcher (terminal.py).
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import mpies
from mpies.config import Settings
from mpies.phases import PHASES
from mpies.ranks.devices import Place, tell_differing_gpus
from mpies.replica import Facts, Setup
from mpies.run.terminal import width_behind
from mpies.run.time_left import Pace
from mpies.runfile import open_for_reading
from mpies.splits import HELD_OUT, spoken
from mpies.text import clip, count, duration


class Screen:
    """Shows a run on rank 0; on other ranks (`quiet`) it shows nothing."""

    def __init__(self, quiet: bool, progress: str):
        terminal = None if quiet or progress == "lines" else width_behind()
        self.bar = not quiet and (progress == "bar" or (progress == "auto" and terminal is not None))
        self.console = Console(
            quiet=quiet,
            force_terminal=self.bar,
            width=terminal or (None if sys.stdout.isatty() else 100),
            highlight=False,
            soft_wrap=not self.bar,
        )
        self._progress: ProgressOfRun | None = None

    def say(self, text: str) -> None:
        """One line, at once."""
        self.console.print(text, markup=False)
        sys.stdout.flush()

    def banner(self, settings: Settings, facts: Facts, setup: Setup, run_file: Path) -> None:
        """What runs where."""
        es, task, places = settings.es, setup.task, setup.places
        pairs = f" in {es.population // 2} antithetic pairs" if es.antithetic else ""
        rows = {
            "model": f"{facts.model_name}, {count(facts.parameters)} parameters,"
            f" digest {facts.model_digest:016x}",
            **({"not tuned": ", ".join(facts.left_out)} if facts.left_out else {}),
            "weights": f"base {facts.base_dtype}, live {facts.dtype} ({facts.dtype_reason})",
            "task": f"{task.name}: {len(task.train)} training, {len(task.held_out)} held-out prompts",
            **({"reward": "\n".join(rewards_shown(setup.reward_digests))} if setup.reward_digests else {}),
            "population": f"{es.population} members{pairs}, sigma {es.sigma:g}, alpha {es.alpha:g},"
            f" seed {es.seed}",
            "perturbation": f"low rank {es.rank}, {es.block} members in a batch"
            if es.noise_rank
            else "full, one member at a time",
            "ranks": f"{len(places)} on {_places(places)}, {settings.run.threads} CPU thread(s) each",
            **({"engine": facts.engine} if facts.engine else {}),
            **({"turns": facts.turns} if facts.turns else {}),
            **({"note": differing} if (differing := tell_differing_gpus(places)) else {}),
            "run file": run_file,
        }
        self.say(f"mpies {mpies.__version__}")
        wide = max(map(len, rows))
        for key, value in rows.items():  # lines, which a terminal breaks: a table would cut long paths
            self.say(f"  {key:{wide}}  {value}".replace("\n", f"\n{'':{wide + 4}}"))
        sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, done: int, total: int):
        """While generations are made, `done` of `total` being there already."""
        self._progress = ProgressOfRun(self, done, total)
        try:
            yield
        finally:  # a bar that is not stopped leaves the cursor hidden
            self._progress.stop()
            self._progress = None

    def generation(self, row: dict[str, Any]) -> None:
        """A generation is committed, within `progress`."""
        if self._progress:
            self._progress.advance(row)

    def result(self, path: Path) -> None:
        """From the run file: answers and rewards before and after, and where the time went."""
        with open_for_reading(path) as file:
            self._answers(file["sample"])
            self._rewards(file["evaluation"])
            self._times(file["generation"], file.attrs["generations_committed"])

    def _answers(self, samples) -> None:
        generation, split = samples["generation"][:], samples["split"].asstr()[:]
        prompts, answers = samples["prompt"].asstr()[:], samples["completion"].asstr()[:]
        kept = [i for i in range(len(split)) if split[i] == HELD_OUT]
        if not kept:
            return
        last = {prompts[i]: answers[i] for i in kept}
        table = Table("held-out prompt", "before", "after", show_lines=True, expand=True)
        for i in kept:
            if generation[i] == 0:
                cells = (prompts[i], answers[i], last[prompts[i]])
                table.add_row(*(Text(clip(text)) for text in cells))
        self.console.print(table)

    def _rewards(self, evaluations) -> None:
        columns = (evaluations[name][:] for name in ("reward_mean", "accuracy", "answer_tokens"))
        splits: dict[str, list[tuple[float, ...]]] = {}
        for split, *row in zip(evaluations["split"].asstr()[:], *columns, strict=True):
            splits.setdefault(split, []).append(tuple(row))
        for split, rows in splits.items():
            (reward, right, tokens), (reward_after, right_after, tokens_after) = rows[0], rows[-1]
            name = spoken(split)
            text = f"mean reward, {name} prompts: {reward:.4g} before, {reward_after:.4g} after"
            if not np.isnan([right, right_after]).any():
                text += f"; right answers: {100 * right:.3g} %, {100 * right_after:.3g} %"
            self.say(f"{text}; tokens an answer: {tokens:.3g}, {tokens_after:.3g}")

    def _times(self, generations, committed: int) -> None:
        seconds = {phase: np.nansum(generations[f"seconds_{phase}"][:committed]) for phase in PHASES}
        total = sum(seconds.values())
        if total:
            shares = sorted(seconds.items(), key=lambda item: -item[1])
            self.say("time: " + ", ".join(f"{p} {100 * s / total:.1f} %" for p, s in shares))

    def next_steps(self, path: Path, settings: Settings, ranks: int) -> None:
        """Where things are and what to type next."""
        generations = settings.es.generations
        python = _as_typed(Path(sys.executable))
        # With run.resume=never it would be refused.
        kept = [a for a in sys.argv[1:] if not a.startswith(("es.generations=", "run.resume="))]
        resume = ["run.resume=auto"] if settings.run.resume == "never" else []
        again = shlex.join([*kept, *resume, f"es.generations={2 * generations or 10}"])
        mpirun = Path(sys.executable).with_name("mpirun")
        launch = _as_typed(mpirun) if mpirun.exists() else "mpirun"
        schedules = {"sigma": settings.es.sigma_schedule, "alpha": settings.es.alpha_schedule}
        stretched = " and ".join(name for name, kind in schedules.items() if kind != "constant")
        change = f", with {stretched} of the longer schedule" if stretched else ""
        self.say(f"tuned model: {path.parent / 'model'} (a Hugging Face folder)")
        self.say(f"run file:    {path} (HDF5; a checkpoint of every generation)")
        self.say("next:")
        self.say(f"  {launch} -n {ranks} {python} -m mpies.train {again}    # go on from here{change}")
        file = shlex.quote(str(path))
        if middle := generations // 2 or min(generations, 1):
            self.say(f"  {python} -m mpies.replay {file} --generation {middle} --output gen{middle}")
        self.say(f"  {python} -m mpies.analyze summary {file}    # also plot, compare, report, watch, ...")
        self.say(f"  {python} -m mpies.train --help    # all settings")


class ProgressOfRun:
    """The generations of a run, as a bar or line by line, and how long those take that are left."""

    def __init__(self, screen: Screen, done: int, total: int):
        self._say = screen.say
        self._done, self._total = done, total
        self._pace = Pace()
        self._bar = Progress(
            TextColumn("generation {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("reward {task.fields[reward]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=screen.console,
            disable=not screen.bar,
        )
        self._task = self._bar.add_task("", completed=done, total=total, reward="...")
        self._bar.start()

    def stop(self) -> None:
        if not self._bar.disable:  # earlier versions of rich end even those with an empty line
            self._bar.stop()

    def advance(self, row: dict[str, Any]) -> None:
        """By a generation, of which this is the run file's row."""
        self._done += 1
        self._pace.note(row["seconds"])
        self._bar.update(self._task, advance=1, reward=f"{row['reward_mean']:.4g}")
        if self._bar.disable:
            self._say(
                f"generation {self._done}/{self._total}  reward {row['reward_mean']:.4g}"
                f" +- {row['reward_std']:.3g}  best {row['reward_max']:.4g}  {row['seconds']:.1f} s"
                f"  {row['tokens'] / row['seconds']:.0f} tokens/s"
                f"  {self._left()}"
            )

    def _left(self) -> str:
        """How many generations are left and, once it is known how long they take, how long that is."""
        left = self._total - self._done
        seconds = self._pace.seconds_of(left)
        return f"{left} left" if math.isnan(seconds) else f"{left} left, {duration(seconds)}"


def _as_typed(program: Path) -> str:
    """A program's path as one would type it here."""
    here = Path.cwd()
    return shlex.quote(str(program.relative_to(here) if program.is_relative_to(here) else program))


def rewards_shown(digests: dict[str, str]) -> list[str]:
    """A line for each of the user's reward functions: where it is, and which file that was."""
    return [f"{name} (SHA-256 {digest[:16]})" for name, digest in digests.items()]


def _places(places: Sequence[Place]) -> str:
    """Hosts with their devices: 'node1 (cuda:0, cuda:1), node2 (...)', shortened for many."""
    hosts: dict[str, Counter] = {}
    for place in places:
        hosts.setdefault(place.host, Counter())[place.device] += 1
    shown = [
        f"{host} ({', '.join(f'{n} x {d}' if n > 1 else d for d, n in devices.items())})"
        for host, devices in list(hosts.items())[:4]
    ]
    more = f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else ""
    return ", ".join(shown) + more
