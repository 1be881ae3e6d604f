"""What a probe found: on screen, as JSON, as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mpies.config import Settings
from mpies.drawing import form_of
from mpies.files import write_report
from mpies.measure.statistics import mean
from mpies.probe import picture, tables
from mpies.probe.probing import Probed
from mpies.probe.recommendation import Recommendation, recommend
from mpies.replica import Facts
from mpies.tasks.base import Task
from mpies.text import json_text


@dataclass(frozen=True)
class ProbeReport:
    about: dict[str, Any]
    """Model, task and the run's settings that figures are about."""
    probed: Probed
    recommended: Recommendation

    @classmethod
    def of(cls, settings: Settings, task: Task, facts: Facts, probed: Probed) -> ProbeReport:
        about = {
            "model": facts.model_path,
            "digest": f"{facts.model_digest:016x}",
            "dtype": facts.dtype,
            "task": task.name,
            "population": settings.es.population,
            "generations": settings.es.generations,
            "prompts_per_generation": probed.prompts_per_generation,
            "fitness": settings.es.fitness,
            "seed": settings.es.seed,
        }
        return cls(about, probed, recommend(settings.es, probed.outcomes, probed.repeated))

    def show(self, console: Console) -> None:
        probed = self.probed
        console.print(tables.of_members(probed, self.recommended))
        told = (
            f"{probed.pairs} pairs, {len(probed.base.rewards)} prompts; signal to noise is that of a"
            f" generation with {probed.prompts_per_generation} prompts."
        )
        console.print(told, soft_wrap=True)
        if probed.ground:
            console.print()
            console.print(tables.of_steps(probed, self.recommended))
            told = (
                f"Steps of these {2 * probed.pairs} members, tried on {_prompts(probed)}, where the"
                f" unperturbed model's reward is {mean(probed.ground.rewards):.4g}."
            )
            console.print(told, soft_wrap=True)
        console.print(f"It cost {probed.answers} answers.", soft_wrap=True)
        console.print(Text(f"recommended: {self.recommended.text()}"), soft_wrap=True)

    def write_json(self, path: Path) -> None:
        """All figures, each prompt's and member's rewards included. Raises StorageError."""
        probed = self.probed
        content = {
            **self.about,
            "pairs": probed.pairs,
            "prompts": len(probed.base.rewards),
            "answers": probed.answers,
            "base": probed.base.figures(),
            "ladder": [outcome.figures() for outcome in probed.outcomes],
            "ground": probed.ground.figures() if probed.ground else None,
            "ground_is_of_members_prompts": probed.repeated,
            "recommended": asdict(self.recommended),
        }
        write_report("--json", path, json_text(content))

    def draw(self, path: Path) -> None:
        """The picture. Raises StorageError."""
        form = form_of(str(path))
        drawn = picture.draw(self.probed, self.recommended, form)
        write_report("--output", path, drawn)


def _prompts(probed: Probed) -> str:
    """How many, in words: the better half of the steps is tried on more."""
    tried = [len(step.after.rewards) for outcome in probed.outcomes for step in outcome.steps]
    first, most = min(tried), max(tried)
    if probed.repeated:
        other = f" (--prompts {probed.rows // 2} leaves others)" if probed.rows > 3 else ""
        return f"the same {first} prompts{other}"
    if first == most:
        return f"{first} other prompts"
    return f"{first} other prompts, and the {tried.count(most)} best on {most}"
