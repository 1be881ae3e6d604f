"""The probe's two tables on screen: what members come to at every sigma, and what steps gain."""

from __future__ import annotations

import math

from rich.table import Table

from mpies.measure.statistics import Figure, mean
from mpies.probe.probing import Probed
from mpies.probe.recommendation import Recommendation, Tried
from mpies.probe.rung import Stride, shown
from mpies.probe.steps import LENGTHS


def of_members(probed: Probed, recommended: Recommendation) -> Table:
    """A row for the unperturbed model, and one for each sigma."""
    right = not math.isnan(mean(probed.base.accuracies))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    accuracy = ["accuracy\nlost"] if right else []
    headings = ["reward", "lost", *accuracy, "dis-\nagree", "iden-\ntical", "cut\noff"]
    for heading in ("sigma", *headings, "signal\n/ noise", ""):
        table.add_column(heading, justify="left" if heading == "sigma" else "right", overflow="fold")
    below = [
        f"{mean(probed.base.rewards):.4g}",
        *([""] * (4 if right else 3)),
        _percent(probed.base.truncated),
    ]
    table.add_row("0", *below)
    for outcome in probed.outcomes:
        table.add_row(
            f"{outcome.rung.sigma:g}",
            f"{mean(outcome.rung.rewards):.4g}",
            shown(outcome.lost),
            *([shown(outcome.accuracy_lost)] if right else []),
            _percent(outcome.disagreement.mean),
            _percent(outcome.rung.identical),
            _percent(outcome.rung.truncated),
            shown(Figure(outcome.signal.to_noise, outcome.to_noise_error)),
            _mark(outcome, recommended),
        )
    return table


def of_steps(probed: Probed, recommended: Recommendation) -> Table:
    """What steps gained: a row for each sigma, a column for each length."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("gained by\na step at", justify="left")
    for length in LENGTHS:
        table.add_column(f"noise\n{length:g} sigma", justify="right", no_wrap=True)
    for outcome in probed.outcomes:
        if outcome.steps:
            cells = [_gain(step, recommended.chose(outcome.rung.sigma, step)) for step in outcome.steps]
            table.add_row(f"{outcome.rung.sigma:g}", *cells)
    return table


def _mark(outcome: Tried, recommended: Recommendation) -> str:
    if outcome.rung.sigma == recommended.sigma:
        return "<-"
    return "" if outcome.bearable else "too far"


def _gain(step: Stride, chosen: bool) -> str:
    return f"{'->' if chosen else ''}{shown(step.gain, signed=True)}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"
