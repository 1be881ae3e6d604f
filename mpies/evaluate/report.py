"""What an evaluation by command found: as a table on screen, as JSON, as rows of the run file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpies.errors import StorageError, reason
from mpies.files import written_whole
from mpies.measure.evaluation import Evaluation, Sampling
from mpies.measure.statistics import Figure, over_prompts, pass_at, pass_ks
from mpies.splits import spoken
from mpies.text import clip, json_ready

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


@dataclass
class Report:
    facts: dict[str, Any]
    """What was evaluated: model, generation, digest, task, ..."""
    splits: list[Split] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, found: Evaluation, sampling: Sampling | None, kl: Figure | None) -> None:
        self.splits.append(Split(name, found, sampling, figures(found) | ({"kl": kl} if kl else {})))

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
        content = {**self.facts, "drift_l2": self.drift or None, "splits": splits}
        text = json.dumps(json_ready(content), indent=1, allow_nan=False) + "\n"
        try:
            with written_whole(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise StorageError(f"--json: cannot write {path} ({reason(error)})") from None

    def tables(self, keep: int, as_trained: bool) -> dict[str, list[dict[str, Any]]]:
        """Rows for `RunFile.add_command`, with the answers to the first `keep` prompts of each split.

        Unless it was measured `as_trained`, nothing is for the tables of the run's own evaluations.
        """
        rows: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("evaluations", "metrics", "samples", "figures", "answers")
        }
        generation = self.facts["generation"]
        for split in self.splits:
            where = {"generation": generation, "split": split.name}
            greedy = split.sampling is None
            # The column tells of the model's own probabilities, at temperature 1.
            plain = split.sampling is None or split.sampling.temperature == 1
            kl = split.figures["kl"].mean if plain and "kl" in split.figures else math.nan
            row, samples, metrics = split.evaluation.table_rows(generation, split.name, keep, kl, self.drift)
            if greedy:
                rows["samples"] += samples
                rows["metrics"] += metrics
            else:
                row = {**where, "kl": kl, "drift_l2": row["drift_l2"]}
            rows["evaluations"].append(row)
            found = split.figures | {_drift_name(g): Figure(far) for g, far in self.drift.items()}
            rows["figures"] += [
                {
                    **where,
                    **split.decoding,
                    "prompts": len(split.evaluation.rows),
                    "name": name,
                    "mean": figure.mean,
                    "error": figure.error,
                }
                for name, figure in found.items()
            ]
            rows["answers"] += [{**where, **split.decoding, **a} for a in split.evaluation.answers(keep)]
        if not as_trained:
            rows |= {name: [] for name in ("evaluations", "metrics", "samples")}
        return rows


def figures(found: Evaluation) -> dict[str, Figure]:
    """Reward, the task's metrics, pass@k where answers are right or wrong, and length."""
    made = {"reward": over_prompts(found.by_prompt(found.rewards))}
    made |= {name: over_prompts(found.by_prompt(values)) for name, values in found.metrics.items()}
    if "accuracy" in found.metrics:
        right = found.by_prompt(found.metrics["accuracy"] == 1)
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
