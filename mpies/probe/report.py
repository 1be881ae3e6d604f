"""What a probe found: as a table on screen, as JSON, as a picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpies.config import Settings
from mpies.drawing import form_of
from mpies.files import write_report
from mpies.measure.statistics import Figure, mean
from mpies.probe import picture
from mpies.probe.recommendation import Recommendation, Tried, recommend
from mpies.probe.rung import Base, Rung
from mpies.replica import Facts
from mpies.tasks.base import Task
from mpies.text import json_text


@dataclass(frozen=True)
class ProbeReport:
    about: dict[str, Any]
    """Model, task and the run's settings that figures are about."""
    base: Base
    outcomes: list[Tried]
    recommended: Recommendation

    @classmethod
    def of(cls, settings: Settings, task: Task, facts: Facts, base: Base, rungs: list[Rung]) -> ProbeReport:
        """`prompts_per_generation` is that of the run, which signal and spread are told for."""
        prompts = task.prompts_per_generation or len(task.train)
        outcomes = [Tried.of(settings.es, base, rung, prompts) for rung in rungs]
        about = {
            "model": facts.model_path,
            "digest": f"{facts.model_digest:016x}",
            "dtype": facts.dtype,
            "task": task.name,
            "population": settings.es.population,
            "generations": settings.es.generations,
            "prompts_per_generation": prompts,
            "fitness": settings.es.fitness,
            "seed": settings.es.seed,
        }
        return cls(about, base, outcomes, recommend(settings.es, outcomes))

    @property
    def pairs(self) -> int:
        return len(self.outcomes[0].rung.rewards) // 2

    @property
    def answers(self) -> int:
        """That the probe has cost."""
        return len(self.base.rewards) + sum(outcome.rung.rewards.size for outcome in self.outcomes)

    def show(self, console: Console) -> None:
        console.print(self._table())
        console.print(
            f"{self.pairs} pairs, {len(self.base.rewards)} prompts; signal to noise is that of a generation"
            f" with {self.about['prompts_per_generation']} prompts. It cost {self.answers} answers.",
            soft_wrap=True,
        )
        console.print(Text(f"recommended: {self.recommended.text()}"), soft_wrap=True)

    def _table(self) -> Table:
        right = not math.isnan(mean(self.base.accuracies))
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        accuracy = ["accuracy\nlost"] if right else []
        headings = ["reward", "lost", *accuracy, "dis-\nagree", "iden-\ntical", "cut\noff"]
        for heading in ("sigma", *headings, "signal\n/ noise", "net", ""):
            table.add_column(heading, justify="left" if heading == "sigma" else "right", overflow="fold")
        below = [
            f"{mean(self.base.rewards):.4g}",
            *([""] * (4 if right else 3)),
            _percent(self.base.truncated),
        ]
        table.add_row("0", *below)
        for tried in self.outcomes:
            mark = "<-" if tried.rung.sigma == self.recommended.sigma else "" if tried.bearable else "too far"
            table.add_row(
                f"{tried.rung.sigma:g}",
                f"{mean(tried.rung.rewards):.4g}",
                _cell(tried.lost),
                *([_cell(tried.accuracy_lost)] if right else []),
                _percent(tried.disagreement.mean),
                _percent(tried.rung.identical),
                _percent(tried.rung.truncated),
                _cell(Figure(tried.signal.to_noise, tried.to_noise_error)),
                _cell(tried.net),
                mark,
            )
        return table

    def write_json(self, path: Path) -> None:
        """All figures, each prompt's and member's rewards included. Raises StorageError."""
        content = {
            **self.about,
            "pairs": self.pairs,
            "prompts": len(self.base.rewards),
            "answers": self.answers,
            "base": {
                "reward": mean(self.base.rewards),
                "accuracy": mean(self.base.accuracies),
                "answer_tokens": mean(self.base.tokens),
                "truncated": self.base.truncated,
                "rewards": self.base.rewards.tolist(),
            },
            "ladder": [outcome.figures() for outcome in self.outcomes],
            "recommended": asdict(self.recommended),
        }
        write_report("--json", path, json_text(content))

    def draw(self, path: Path) -> None:
        """The picture. Raises StorageError."""
        form = form_of(str(path))
        drawn = picture.draw(self.base, self.outcomes, self.recommended.sigma, form)
        write_report("--output", path, drawn)


def _cell(figure: Figure) -> str:
    if math.isnan(figure.mean):
        return "-"
    if math.isnan(figure.error):
        return f"{figure.mean:.3g}"
    error = f"{figure.error:.0f}" if figure.error >= 10 else f"{figure.error:.1g}"
    return f"{figure.mean:.3g}+-{error}"


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f} %"
