"""A run's tables for other programs: CSV, Parquet, JSON, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies.analyze import series
from mpies.analyze.evaluations import logged_evaluations
from mpies.analyze.run import Run
from mpies.analyze.summary import summarize
from mpies.errors import InputError, reason
from mpies.extras import need
from mpies.text import json_ready

if TYPE_CHECKING:
    import pandas

FRAMES = ("generations", "members", "evaluations", "samples", "starts")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
OPTIONAL_FRAMES = ("metrics", "prompts", "figures", "answers")  # where there are any
HEADINGS = ("reward", "seconds", "cosine")  # of columns of /generation


def export_run(run: Run, name: str, form: str, output: Path) -> list[Path]:
    """Write the run in a form of FORMS to a folder, or for JSON to a file. Returns what was written.

    Raises InputError if the place cannot be written to, or a library is missing.
    """
    try:
        return FORMS[form](run, name, output)
    except OSError as error:
        raise InputError(f"--output: cannot write {output} ({reason(error)})") from None


def _csv(run: Run, name: str, output: Path) -> list[Path]:
    # Texts in double quotes: a carriage return in one would begin a row.
    options = {"quoting": csv.QUOTE_NONNUMERIC}
    return _tables(
        run, output, "csv", lambda table, path, index: _inert(table).to_csv(path, index=index, **options)
    )


def _inert(frame: pandas.DataFrame) -> pandas.DataFrame:
    """With a quotation mark before texts that a spreadsheet would take for a formula: a model wrote them."""
    made = frame.copy()
    for name in made:
        if made[name].dtype.kind not in "biuf":
            made[name] = [
                f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
                for cell in made[name]
            ]
    return made


def _parquet(run: Run, name: str, output: Path) -> list[Path]:
    need("pyarrow", "Parquet")
    return _tables(run, output, "parquet", lambda frame, path, index: frame.to_parquet(path, index=index))


def _tables(run: Run, output: Path, suffix: str, write: Callable[..., Any]) -> list[Path]:
    """A file per table, and the settings of the latest start."""
    need("pandas", "export")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for table in FRAMES + OPTIONAL_FRAMES:
        frame = getattr(run, table)
        if table in OPTIONAL_FRAMES and frame.empty:
            continue
        written.append(output / f"{table}.{suffix}")
        write(frame, written[-1], table in ("generations", "members"))
    written.append(output / "settings.yaml")
    written[-1].write_text(run.configs[-1])
    return written


def _json(run: Run, name: str, output: Path) -> list[Path]:
    """One document: attributes, settings, and tables as column -> values, members (G, N). NaN is null."""
    tables = {
        table: {key: json_ready(values.tolist()) for key, values in columns.items()}
        for table, columns in run.tables.items()
    }
    whole = {"attributes": run.attributes, "settings": run.settings, **tables}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(whole, allow_nan=False, default=str))
    return [output]


def scalars(run: Run) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, time in seconds since the epoch, values by name), in the order of steps.

    A generation's values are at its number g: they are about the weights after g updates, as the
    evaluations at g are. What was not measured is left out.
    """
    evaluations: dict[int, dict[str, float]] = {}
    table = run.tables["evaluation"]
    measured = [c for c, values in table.items() if values.dtype.kind in "fi" and c != "generation"]
    for i, (generation, split) in enumerate(zip(table["generation"].tolist(), table["split"])):
        values = {f"{split}/{column}": float(table[column][i]) for column in measured}
        evaluations.setdefault(generation, {}).update(_finite(values))
    for later in logged_evaluations(run):
        values = {
            f"{later.split}, {later.decoding}/{name}": mean for name, (mean, _) in later.figures.items()
        }
        evaluations.setdefault(later.generation, {}).update(_finite(values))
    columns = {
        name: values
        for name, values in run.tables["generation"].items()
        if name != "digest" and values.dtype.kind in "biuf"
    }
    ended = series.finished_at(run).tolist()
    for g in range(run.committed + 1):
        values = {_tag(c): float(v[g]) for c, v in columns.items()} if g < run.committed else {}
        values = {**_finite(values), **evaluations.get(g, {})}
        if values:
            yield g, ended[min(g, run.committed - 1)] if ended else run.written, values


def _tag(column: str) -> str:
    """TensorBoard and W&B put what is before the slash under one heading."""
    heading, _, rest = column.partition("_")
    return f"{heading}/{rest}" if heading in HEADINGS and rest else f"generation/{column}"


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _tensorboard(run: Run, name: str, output: Path) -> list[Path]:
    """An event file: scalars, histograms of the members' rewards, answers, settings."""
    if any(output.glob("events.out.tfevents.*")):
        raise InputError(f"--output: {output} holds TensorBoard events already, which would mix with these")
    writer = need("tensorboardX", "export --to tensorboard").SummaryWriter(str(output), flush_secs=3600)
    rewards = run.column("member/reward")
    ended = series.finished_at(run)
    for step, when, values in scalars(run):
        for tag, value in values.items():
            writer.add_scalar(tag, value, step, when)
        scored = rewards[step][np.isfinite(rewards[step])] if step < run.committed else []
        if len(scored):
            writer.add_histogram("reward/members", scored, step, walltime=ended[step])
    writer.add_text("settings", f"```yaml\n{run.configs[-1]}\n```", 0)
    for step, text in _sample_texts(run):
        writer.add_text("samples", text, step)
    writer.close()
    return [output]


def _sample_texts(run: Run) -> Iterator[tuple[int, str]]:
    """The answers of each evaluation, as Markdown."""
    table = run.tables["sample"]
    for g in np.unique(table["generation"]).tolist():
        rows = np.flatnonzero(table["generation"] == g)
        parts = [
            f"**{table['split'][i]}**, reward {table['reward'][i]:.4g}\n\n{_quoted(table['prompt'][i])}\n\n"
            f"{_quoted(table['completion'][i])}"
            for i in rows
        ]
        yield g, "\n\n---\n\n".join(parts)


def _quoted(text: str) -> str:
    """A Markdown code block, which shows a model's output and does not interpret it."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _wandb_offline(run: Run, name: str, output: Path) -> list[Path]:
    """A folder that `wandb sync` uploads."""
    wandb = need("wandb", "export --to wandb-offline", "wandb")
    output.mkdir(parents=True, exist_ok=True)
    quiet = wandb.Settings(console="off", silent=True)
    log = wandb.init(
        mode="offline",
        dir=str(output),
        project="mpies",
        name=name,
        id=run.attributes["run_uuid"],
        config={**run.settings, "attributes": run.attributes},
        settings=quiet,
    )
    for step, when, values in scalars(run):
        log.log({**values, "_timestamp": when}, step=step)
    log.summary.update(_finite({"efficiency": summarize(run, name).efficiency}))
    log.finish()
    return [output]


FORMS = {
    "csv": _csv,
    "parquet": _parquet,
    "json": _json,
    "tensorboard": _tensorboard,
    "wandb-offline": _wandb_offline,
}
