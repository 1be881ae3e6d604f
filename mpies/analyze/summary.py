"""A run in a few numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpies.analyze import learning, series
from mpies.analyze.anomalies import find_anomalies
from mpies.analyze.evaluations import LoggedEvaluation, logged_evaluations
from mpies.analyze.learning import Change
from mpies.analyze.run import Run
from mpies.splits import HELD_OUT


@dataclass(frozen=True)
class Summary:
    """Rewards are NaN, and generations None, where nothing was measured."""

    name: str
    path: str
    run_uuid: str
    created_utc: str
    model: str
    parameters: int
    dtype: str
    settings: dict[str, Any]
    """Settings that matter most, by full key."""
    ranks: int
    """Of the latest start, as are hosts, devices and versions."""
    hosts: dict[str, int]
    """Host -> number of ranks on it."""
    devices: dict[str, int]
    versions: dict[str, str]
    generations: int
    target: int
    reward_first: float
    """Mean over the members of the first generation."""
    reward_last: float
    """Mean over the members of the last twentieth of the generations."""
    held_out_first: float
    held_out_last: float
    held_out_best: float
    best_generation: int | None
    """What `mpies.replay --generation best` rebuilds."""
    measured: dict[str, tuple[float, float]]
    """What else was measured on held-out prompts, such as accuracy and KL: (first, last)."""
    answers: dict[str, float]
    """What the latest generations' answers tell, by column of /generation."""
    cosines: dict[str, float]
    """Figure -> cosine of its own update with the one that was made, by mean over the latest generations."""
    changes: list[Change]
    """On held-out prompts, from one evaluation to the next, and in all."""
    evaluations: list[LoggedEvaluation]
    """What `mpies.evaluate` measured later."""
    seconds: float
    """Computing time of all generations."""
    time_shares: dict[str, float]
    """Phase -> share of the time, by mean over ranks."""
    tokens: int
    tokens_per_second: float
    imbalance: float
    """Slowest rank's evaluation time over the mean, by mean over generations."""
    anomalies: list[str]

    @property
    def efficiency(self) -> float:
        """Share of the time that goes into inference."""
        return self.time_shares.get("generate", math.nan)


KEYS = (
    "task.name",
    "es.population",
    "es.sigma",
    "es.alpha",
    "es.seed",
    "es.antithetic",
    "es.perturbation",
    "es.rank",
    "es.block",
    "engine.name",
    "engine.max_new_tokens",
)


def summarize(run: Run, name: str) -> Summary:
    """The summary of a run, also of one without a generation so far."""
    seconds = float(np.nansum(run.column("generation/seconds")))
    tokens = int(np.nansum(run.column("generation/tokens")))
    return Summary(
        name=name,
        path=str(run.path),
        **{key: run.attributes[key] for key in ("run_uuid", "created_utc", "parameters", "dtype")},
        model=run.attributes["model_path"],
        settings=_main_settings(run.settings),
        **_places(run),
        generations=run.committed,
        target=run.target,
        **_rewards(run),
        measured=_measured(run),
        answers=learning.told_lately(run),
        cosines=learning.cosines_lately(run),
        changes=learning.changes(run, HELD_OUT),
        evaluations=logged_evaluations(run),
        seconds=seconds,
        time_shares=_time_shares(run),
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else math.nan,
        imbalance=series.mean(run.column("generation/imbalance")),
        anomalies=find_anomalies(run),
    )


def _main_settings(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for key in KEYS:
        section, name = key.split(".")
        if name in settings.get(section, {}):
            found[key] = settings[section][name]
    if found.get("es.perturbation") == "full":  # what low-rank noise only uses
        found.pop("es.rank", None)
        found.pop("es.block", None)
    return found


def _places(run: Run) -> dict[str, Any]:
    start = {name: column[-1] for name, column in run.tables["start"].items()}
    return {
        "ranks": int(start["world_size"]),
        "hosts": dict(Counter(start["hosts"].split(","))),
        "devices": dict(Counter(start["devices"].split(","))),
        "versions": _versions(start["versions"]),
    }


def _versions(text: str) -> dict[str, str]:
    try:
        versions = json.loads(text)
    except ValueError:
        return {}
    return versions if isinstance(versions, dict) else {}


def _rewards(run: Run) -> dict[str, Any]:
    means = run.column("generation/reward_mean")
    generations, held_out = run.evaluated(HELD_OUT)
    # The first of equals, as mpies.replay takes it.
    best = int(held_out.argmax()) if held_out.size else None
    return {
        "reward_first": float(means[0]) if means.size else math.nan,
        "reward_last": series.last_mean(means),
        "held_out_first": float(held_out[0]) if held_out.size else math.nan,
        "held_out_last": float(held_out[-1]) if held_out.size else math.nan,
        "held_out_best": float(held_out[best]) if held_out.size else math.nan,
        "best_generation": int(generations[best]) if held_out.size else None,
    }


def _measured(run: Run) -> dict[str, tuple[float, float]]:
    others = [c for c in run.tables["evaluation"] if c not in ("generation", "reward_mean", "tokens")]
    found = {column: run.evaluated(HELD_OUT, column)[1] for column in others}
    return {column: (float(v[0]), float(v[-1])) for column, v in found.items() if v.size}


def _time_shares(run: Run) -> dict[str, float]:
    totals = {phase: float(seconds.sum()) for phase, seconds in series.phase_seconds(run).items()}
    everything = sum(totals.values())
    return {phase: total / everything for phase, total in totals.items()} if everything else {}
