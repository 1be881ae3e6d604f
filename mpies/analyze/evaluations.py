"""What `python -m mpies.evaluate --log` measured of a run's weights after training had noted them."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpies.analyze.run import Run

LAYERS = "drift_l2 "  # of a group of layers: too many for a line


@dataclass(frozen=True)
class LoggedEvaluation:
    generation: int
    """Updates in the evaluated weights; 0: the initial model."""
    split: str
    prompts: int
    decoding: str
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (mean, standard error over prompts; NaN: none)."""

    def text(self) -> str:
        """The figures on a line, drift by layers left out."""
        return ", ".join(_figure(n, *f) for n, f in self.figures.items() if not n.startswith(LAYERS))


def logged_evaluations(run: Run) -> list[LoggedEvaluation]:
    """By generation; of a figure that was logged again, the latest."""
    found: dict[tuple, LoggedEvaluation] = {}
    for row in rows_of(run, "figure"):
        key = row["generation"], row["split"], row["samples"], row["temperature"], row["seed"], row["prompts"]
        made = LoggedEvaluation(row["generation"], row["split"], row["prompts"], describe_decoding(**row))
        found.setdefault(key, made).figures[row["name"]] = (row["mean"], row["error"])
    return sorted(found.values(), key=lambda e: (e.generation, e.split))


def describe_decoding(samples: int, temperature: float, seed: int, **_) -> str:
    """How answers were made: 'greedy', or '16 samples at T=0.7, seed 42'."""
    if not temperature:
        return "greedy"
    return f"{samples} sample{'s' * (samples != 1)} at T={temperature:g}, seed {seed}"


def rows_of(run: Run, table: str) -> list[dict]:
    """A table's rows, column name -> Python value."""
    columns = run.tables[table]
    return [dict(zip(columns, row)) for row in zip(*(values.tolist() for values in columns.values()))]


def _figure(name: str, mean: float, error: float) -> str:
    return f"{name} {mean:.4g}" + ("" if error != error else f" +- {error:.2g}")
