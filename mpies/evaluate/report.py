"""What an evaluation by command found: as a table on screen, as JSON, as rows of the run file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpies.files import write_report
from mpies.measure.evaluation import Evaluation, Sampling
from mpies.measure.statistics import Figure, over_prompts, pass_at, pass_ks
from mpies.splits import spoken
from mpies.text import clip, json_text

# Table of the run file -> rows for it.
Tables = dict[str, list[dict[str, Any]]]

LABELS = {"answer_tokens": "tokens an answer", "kl": "KL to the initial model, nat/token"}


@dataclass(frozen=True)
class Split:
    name: str
    evaluation: Evaluation
    sampling: Sampling | None
    figures: dict[str, Figure]

    @property
    def decoding(self) -> dict[str, Any]:
        """Samples, temperature and seed; temperature 0: greedy."""
        sampling = self.sampling or Sampling(1, 0.0)
        return {name: getattr(sampling, name) for name in ("samples", "temperature", "seed")}

    def command_rows(self, generation: int, keep: int, drift: dict[str, float]) -> Tables:
        """Of the tables `figures` and `answers`."""
        where = {"generation": generation, "split": self.name, **self.decoding}
        prompts, found = len(self.evaluation.rows), self.figures
        found = found | {_drift_name(group): Figure(far) for group, far in drift.items()}
        figures = [
            {**where, "prompts": prompts, "name": name, "mean": figure.mean, "error": figure.error}
            for name, figure in found.items()
        ]
        return {"figures": figures, "answers": [{**where, **a} for a in self.evaluation.answers(keep)]}

    def run_rows(self, generation: int, keep: int, drift: dict[str, float]) -> Tables:
        """Of the tables of the run's own evaluations, whose answers are greedy."""
        # The column tells of the model's own probabilities, at temperature 1.
        plain = self.sampling is None or self.sampling.temperature == 1
        kl = self.figures["kl"].mean if plain and "kl" in self.figures else math.nan
        row, samples, metrics = self.evaluation.table_rows(generation, self.name, keep, kl, drift)
        if self.sampling:
            kept = {name: row[name] for name in ("generation", "split", "kl", "drift_l2")}
            return {"evaluations": [kept]}
        prompts = [self.evaluation.prompt_rows(generation, self.name)]
        return {"evaluations": [row], "metrics": metrics, "samples": samples, "prompts": prompts}


@dataclass(frozen=True)
class Evaluand:
    """What was evaluated, and how, as the JSON file says it."""

    model: str
    run_file: str | None
    run_uuid: str | None
    generation: int | None
    digest: str
    dtype: str
    task: str
    data_digest: str
    max_new_tokens: int
    initial: str | None
    """What it was compared with."""


@dataclass
class Report:
    subject: Evaluand
    splits: list[Split] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, found: Evaluation, sampling: Sampling | None, kl: Figure | None) -> None:
        self.splits.append(Split(name, found, sampling, make_figures(found) | ({"kl": kl} if kl else {})))

    def show(self, console: Console, keep: int) -> None:
        """Figures of all splits, and the first answers to the first `keep` prompts of the last one."""
        names = list(dict.fromkeys(name for split in self.splits for name in split.figures))
        table = Table("mean +- standard error", *(spoken(s.name) for s in self.splits))
        table.add_row("prompts", *(str(len(s.evaluation.rows)) for s in self.splits))
        table.add_row("answers to each", *(str(s.evaluation.samples) for s in self.splits))
        for name in names:
            cells = (_cell(split.figures.get(name)) for split in self.splits)
            table.add_row(Text(LABELS.get(name, name)), *cells)
        console.print(table)
        if self.drift:
            moved = ", ".join(f"{group} {far:.4g}" for group, far in self.drift.items())
            console.print(f"distance from the initial weights: {moved}", soft_wrap=True)
        _show_answers(console, self.splits[-1], keep)

    def write_json(self, path: Path) -> None:
        """All figures and all answers. The file appears whole or not at all; raises StorageError."""
        splits = {
            s.name: {
                "prompts": len(s.evaluation.rows),
                **s.decoding,
                "figures": {n: {"mean": f.mean, "error": f.error} for n, f in s.figures.items()},
                "answers": s.evaluation.answers(len(s.evaluation.rows)),
            }
            for s in self.splits
        }
        content = {**asdict(self.subject), "drift_l2": self.drift or None, "splits": splits}
        write_report("--json", path, json_text(content))

    def tables(self, generation: int, keep: int, as_trained: bool) -> Tables:
        """Rows for `RunFile.add_command`, with the answers to the first `keep` prompts of each split.

        Unless it was measured `as_trained`, nothing is for the tables of the run's own evaluations.
        """
        tables = ("evaluations", "metrics", "samples", "figures", "answers", "prompts")
        rows: Tables = {name: [] for name in tables}
        for split in self.splits:
            made = split.command_rows(generation, keep, self.drift)
            if as_trained:
                made |= split.run_rows(generation, keep, self.drift)
            for name, more in made.items():
                rows[name] += more
        return rows


def make_figures(found: Evaluation) -> dict[str, Figure]:
    """Reward, the task's metrics, pass@k where answers are right or wrong, and length."""
    made = {"reward": over_prompts(found.by_prompt(found.rewards))}
    made |= {name: over_prompts(found.by_prompt(values)) for name, values in found.metrics.items()}
    if "accuracy" in found.metrics:
        right = found.by_prompt(found.metrics["accuracy"])
        made |= {f"pass@{k}": pass_at(right, k) for k in pass_ks(found.samples)}
    made["answer_tokens"] = over_prompts(found.by_prompt(found.tokens.astype(np.float64)))
    return made


def _show_answers(console: Console, split: Split, keep: int) -> None:
    answers = [a for a in split.evaluation.answers(keep) if a["sample"] == 0]
    if answers:
        title = f"{spoken(split.name)} prompt"
        table = Table(title, "answer", "reward", show_lines=True, expand=True)
        for answer in answers:
            texts = (Text(clip(answer[key])) for key in ("prompt", "completion"))
            table.add_row(*texts, f"{answer['reward']:.4g}")
        console.print(table)


def _cell(figure: Figure | None) -> str:
    if figure is None or math.isnan(figure.mean):
        return "-"
    error = "" if math.isnan(figure.error) else f" +- {figure.error:.2g}"
    return f"{figure.mean:.4g}{error}"


def _drift_name(group: str) -> str:
    return "drift_l2" if group == "all" else f"drift_l2 {group}"
