"""One self-contained HTML page about runs: no script, nothing from anywhere else."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources

import mpies
from mpies import drawing
from mpies.analyze import figures
from mpies.analyze.answers import Answer, answered_prompts, answers_to
from mpies.analyze.compare import Comparison, compare_runs
from mpies.analyze.run import Run, short_names
from mpies.analyze.summary import Summary, summarize
from mpies.analyze.terminal import facts_of, number
from mpies.errors import InputError
from mpies.extras import need
from mpies.splits import HELD_OUT, spoken

PROMPTS = 8  # whose answers are shown, of a run
ANSWERS = 12  # of a prompt: the first, the last, and some between
FIGURES = 6  # runs that get a figure of their own, besides the common one


@dataclass(frozen=True)
class RunSection:
    """What the page says of one run."""

    run: Run
    summary: Summary
    facts: dict[str, str]
    figure: str | None
    """An image as a data URL."""
    answers: list[tuple[str, str, list[Answer]]]
    """(split, prompt, answers)."""


def render_page(runs: list[Run]) -> str:
    """The page, as HTML. Answers and names are shown as text, whatever they contain."""
    jinja2 = need("jinja2", "report")
    need("matplotlib", "report")
    page = resources.files("mpies.analyze").joinpath("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "spoken": spoken}
    return environment.from_string(page).render(
        sections=_sections(runs),
        figure=_figure(runs) if len(runs) > 1 else None,
        comparison=_comparison(runs),
        version=mpies.__version__,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _sections(runs: list[Run]) -> list[RunSection]:
    sections = []
    for run, name in zip(runs, short_names(runs), strict=True):
        summary = summarize(run, name)
        own_figure = _figure([run]) if len(runs) <= FIGURES else None
        sections.append(RunSection(run, summary, facts_of(summary), own_figure, _answers(run)))
    return sections


def _figure(runs: list[Run]) -> str | None:
    """As a data URL of an SVG image, in which nothing can run or be loaded; None without a generation."""
    try:
        figure = figures.draw(runs)
    except InputError:
        return None
    picture = io.BytesIO()
    drawing.save(figure, picture, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()


def _comparison(runs: list[Run]) -> Comparison | None:
    for metric in (HELD_OUT, "reward"):
        try:
            return compare_runs(runs, metric) if len(runs) > 1 else None
        except InputError:
            continue
    return None


def _answers(run: Run) -> list[tuple[str, str, list[Answer]]]:
    shown = []
    for split, prompt in answered_prompts(run)[:PROMPTS]:
        found = answers_to(run, split, prompt)
        greedy, sampled = ([a for a in found if bool(a.sampled) is kind] for kind in (False, True))
        shown.append((split, prompt, thinned(greedy) + thinned(sampled)))
    return shown


def thinned(found: list) -> list:
    """At most ANSWERS of them, evenly spread, the first and the last among them."""
    if len(found) <= ANSWERS:
        return found
    return [found[i * (len(found) - 1) // (ANSWERS - 1)] for i in range(ANSWERS)]
