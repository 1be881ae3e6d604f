"""Runs that differ in nothing but the seed belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpies.analyze.run import Run
from mpies.config import Role, role_of

SEED = "es.seed"


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed."""

    label: str
    """The settings in which the groups differ: "sigma=0.001, population=30"."""
    settings: dict[str, Any]
    """The same by full key; None for a setting that a run's version did not have."""
    runs: list[Run]

    @property
    def seeds(self) -> list[int | None]:
        """The distinct seeds, in the runs' order."""
        return list(dict.fromkeys(seed_of(run) for run in self.runs))


def seed_of(run: Run) -> int | None:
    return run.settings.get("es", {}).get("seed")


def relevant_settings(run: Run) -> dict[str, Any]:
    """What a run's result depends on, by full key: settings, initial model, dtype; not the seed."""
    flat = {f"{section}.{key}": v for section, keys in run.settings.items() for key, v in keys.items()}
    kept = {key: v for key, v in flat.items() if key != SEED and role_of(key) is not Role.JOB}
    model = {"model.path": run.attributes["model_path"], "model.dtype": run.attributes["dtype"]}
    return {**model, **kept}


def group(runs: list[Run]) -> list[Group]:
    """The runs' groups, ordered by the values of the settings in which they differ."""
    differing = _differing(runs)
    members: dict[tuple, list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(repr(_value(run, key)) for key in differing), []).append(run)
    found = []
    for key, same in members.items():
        settings = {key: relevant_settings(same[0]).get(key) for key in differing}
        found.append(Group(_label(settings), settings, same))
    return sorted(found, key=lambda g: [_order(value) for value in g.settings.values()])


def _differing(runs: list[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in relevant_settings(run))
    return [key for key in keys if len({repr(_value(run, key)) for run in runs}) > 1]


def _value(run: Run, key: str) -> Any:
    # A model is its weights, wherever they lie.
    return run.attributes["model_digest"] if key == "model.path" else relevant_settings(run).get(key)


def _label(settings: dict[str, Any]) -> str:
    """Short names where they are plain enough."""
    short = [key.rpartition(".")[2] for key in settings]
    shown = [name if short.count(name) == 1 and name != "name" else key for key, name in zip(settings, short)]
    values = map(as_written, settings.values())
    return ", ".join(f"{name}={value}" for name, value in zip(shown, values)) or "same settings"


def as_written(value: Any) -> str:
    """A setting's value as one would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(value: Any) -> tuple:
    is_number = isinstance(value, (int, float))
    return (not is_number, value if is_number else 0, str(value))
