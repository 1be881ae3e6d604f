"""Summaries on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpies.analyze.answers import Answer
from mpies.analyze.chart import draw_chart, sparkline
from mpies.analyze.compare import Comparison
from mpies.analyze.groups import as_written
from mpies.analyze.learning import TOLD
from mpies.analyze.run import Run
from mpies.analyze.summary import Summary
from mpies.splits import HELD_OUT, TRAIN, spoken
from mpies.text import clip, count, duration, printable

WIDTH = 100  # of what goes to a file or a pipe


class Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit with 1; that nobody reads on is no failure, as main() knows."""
        raise BrokenPipeError


def open_console() -> Console:
    """Prints to standard output, whatever its encoding."""
    return Terminal(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def is_plain(screen: Console) -> bool:
    """Does the screen show ASCII only?"""
    return not screen.encoding.lower().startswith("utf")


def number(value: float | None) -> str:
    """A reward or a ratio; a dash where nothing was measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def render_detail(run: Run, summary: Summary, screen: Console) -> RenderableType:
    """All of a run's summary, its curves included."""
    table = Table.grid(padding=(0, 2))
    for key, value in facts_of(summary).items():
        table.add_row(f"  {key}", Text(value))
    curves = _curves(run, min(screen.width, WIDTH) - 4, is_plain(screen))
    return Group(
        Text(summary.name, style="bold"), table, *_evaluations(summary), *curves, *_warnings(summary)
    )


def render_overview(runs: list[Run], summaries: list[Summary], screen: Console) -> RenderableType:
    """A line for each of several runs, and their anomalies. A narrow screen gets fewer columns."""
    columns = [column for column in COLUMNS if screen.width >= column.from_width]
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=14)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for run, s in zip(runs, summaries, strict=True):
        cells = (Text(column.cell(run, s, is_plain(screen))) for column in columns)
        table.add_row(Text(s.name), *cells)
    lines = [Text(f"  {s.name}: {line}", style="yellow") for s in summaries for line in s.anomalies]
    return Group(table, *([Text("to look at:"), *lines] if lines else []))


@dataclass(frozen=True)
class OverviewColumn:
    heading: str
    cell: Callable[[Run, Summary, bool], str]
    """From the run, its summary, and whether the screen shows ASCII only."""
    from_width: int = 0
    """Characters of a screen that has room for it."""


COLUMNS = [
    OverviewColumn("done", lambda run, s, plain: f"{s.generations}/{s.target}"),
    OverviewColumn("reward", lambda run, s, plain: f"{_brief(s.reward_first)} > {_brief(s.reward_last)}"),
    OverviewColumn("", lambda run, s, plain: sparkline(run.column("generation/reward_mean"), 10, plain), 90),
    OverviewColumn(
        "held-out", lambda run, s, plain: f"{_brief(s.held_out_first)} > {_brief(s.held_out_last)}"
    ),
    OverviewColumn("best at", lambda run, s, plain: number(s.best_generation), 75),
    OverviewColumn("members", lambda run, s, plain: str(run.population), 115),
    OverviewColumn("s/gen", lambda run, s, plain: _brief(s.seconds / max(1, s.generations)), 110),
    OverviewColumn("tokens/s", lambda run, s, plain: _brief(s.tokens_per_second), 85),
    OverviewColumn("inference", lambda run, s, plain: _percent(s.efficiency), 95),
]


def _brief(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def facts_of(s: Summary) -> dict[str, str]:
    """What is said of a run, by heading."""
    settings = " ".join(f"{_short(key)}={as_written(value)}" for key, value in s.settings.items())
    hosts = ", ".join(f"{clip(host, 40)} ({n})" for host, n in list(s.hosts.items())[:4])
    more = f" and {len(s.hosts) - 4} more hosts" if len(s.hosts) > 4 else ""
    devices = ", ".join(clip(device, 60) for device in list(s.devices)[:4])
    software = " ".join(f"{name} {version}" for name, version in list(s.versions.items())[:4])
    facts = {
        "model": f"{clip(s.model)}, {count(s.parameters)} parameters, live weights {s.dtype}",
        "settings": settings,
        "where": f"{s.ranks} ranks: {hosts}{more}; {devices}",
        "software": clip(software),
        "begun": s.created_utc,
        "progress": f"{s.generations} of {s.target} generations in {duration(s.seconds)}",
    }
    if not s.generations:
        return facts
    shares = sorted(s.time_shares.items(), key=lambda item: -item[1])
    facts["reward"] = f"{number(s.reward_first)} in the first generation, {number(s.reward_last)} lately"
    facts["held-out"] = _held_out(s)
    if s.measured:
        values = (f"{name} {number(a)} > {number(b)}" for name, (a, b) in s.measured.items())
        facts["measured"] = f"on held-out prompts, first > last: {', '.join(values)}"
    facts |= _why(s)
    facts["time"] = ", ".join(f"{phase} {_percent(share)}" for phase, share in shares if share >= 0.0005)
    facts["speed"] = (
        f"{s.seconds / s.generations:.3g} s a generation, {number(s.tokens_per_second)} tokens/s,"
        f" {_percent(s.efficiency)} of the time in inference, imbalance {number(s.imbalance)}"
    )
    return facts


def _why(s: Summary) -> dict[str, str]:
    """Why it learns, or not; see analyze/learning.py."""
    facts = {}
    if s.answers:
        told = [f"{_percent(s.answers[name])} {what}" for name, what in TOLD.items() if name in s.answers]
        facts["answers"] = f"lately, {', '.join(told)}; {number(s.answers.get('distinct_answers'))} different"
        facts["answers"] += " answers to a prompt"
    if s.cosines:
        shares = (
            f"{clip(n, 40)} {c:.2f} ({100 * c * c:.0f} % of it)" for n, c in list(s.cosines.items())[:8]
        )
        facts["update"] = f"its cosine with that of each figure alone, lately: {', '.join(shares)}"
    if s.changes:
        change = s.changes[-1]
        facts["prompts"] = f"held-out, generation {change.before} to {change.after}: {change.text()}"
    return facts


def _evaluations(s: Summary) -> list[RenderableType]:
    """What `mpies.evaluate` measured later, an evaluation a row."""
    if not s.evaluations:
        return []
    table = Table("  evaluated at", "split", "answers", "mean +- standard error", box=None, pad_edge=False)
    for e in s.evaluations:
        where = f"  generation {e.generation}", f"{spoken(e.split)} ({e.prompts})", e.decoding
        table.add_row(*map(Text, where), Text(clip(e.text(), 500)))
    return [Text(""), table]


def _short(key: str) -> str:
    """es.sigma is sigma, but task.name is task."""
    section, name = key.split(".")
    return section if name == "name" else name


def _held_out(s: Summary) -> str:
    if s.best_generation is None:
        return "not evaluated"
    return (
        f"{number(s.held_out_first)} at first, {number(s.held_out_last)} at last,"
        f" best {number(s.held_out_best)} at generation {s.best_generation}"
    )


def _curves(run: Run, width: int, plain: bool) -> list[RenderableType]:
    points = {mark: run.evaluated(split) for mark, split in (("x", TRAIN), ("o", HELD_OUT))}
    curve = run.column("generation/reward_mean")
    lines = draw_chart(np.asarray(curve), points, width, 10, plain)
    if not lines:
        return []
    marks = "line: mean of the members; x: unperturbed weights on training prompts, o: on held-out prompts"
    return [Text(""), *(Text(f"  {line}", no_wrap=True) for line in lines), Text(f"  {marks}", style="dim")]


def _warnings(s: Summary) -> list[RenderableType]:
    return [Text(f"  ! {line}", style="yellow") for line in s.anomalies]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def render_comparison(result: Comparison) -> RenderableType:
    """Groups, best first, and what to make of them."""
    title = Text(result.title, style="bold")
    table = Table("settings", box=None, pad_edge=False)
    for heading in ("seeds", "mean", "std", "generation", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        low, high = row.generations
        at = "-" if not row.values else str(low) if low == high else f"{low} to {high}"
        columns = (str(row.seeds), number(row.mean), number(row.deviation), at, number(row.p))
        table.add_row(Text(row.group.label, overflow="fold"), *columns)
    legend = "std: over seeds. p: against the first row, permutation test over seeds, Holm-corrected"
    notes = [Text(f"! {note}", style="yellow") for note in result.notes]
    return Group(title, table, Text(legend, style="dim"), *notes)


def render_prompts(known: list[tuple[str, str]]) -> RenderableType:
    """The prompts of which there are answers, with their numbers."""
    table = Table("", "split", "prompt", box=None, pad_edge=False)
    for i, (split, prompt) in enumerate(known, 1):
        table.add_row(str(i), spoken(split), Text(clip(prompt, 200)))
    return table


def render_answers(split: str, prompt: str, found: list[Answer], full: bool) -> RenderableType:
    """A prompt's answers, one below the other."""
    table = Table(box=None, pad_edge=False)
    table.add_column("generation", justify="right")
    table.add_column("reward", justify="right")
    table.add_column("answer")
    for answer in found:
        made = f"{answer.generation}{f' ({answer.sampled})' if answer.sampled else ''}"
        table.add_row(made, number(answer.reward), _shown(answer, _lines if full else clip))
    title = Text(f"{_lines(prompt) if full else clip(prompt, 300)} ({spoken(split)})", style="bold")
    return Group(title, table)


def _shown(answer: Answer, written: Callable[[str], str]) -> Text:
    """An answer, or who said what in an episode: each message on lines of its own."""
    if not answer.lines:
        return Text(written(answer.completion))
    parts: list[tuple[str, str]] = []
    for line in answer.lines:
        parts += [(f"{printable(line.who)}: ", "bold" if line.who == "assistant" else "dim")]
        parts += [(f"{written(line.text)}\n", "dim" if line.who == "end" else "")]
    return Text.assemble(*parts)


def _lines(text: str) -> str:
    """The text with its line breaks, but no other control characters."""
    return "\n".join(printable(line) for line in text.splitlines())
