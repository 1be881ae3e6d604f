"""The report: JSON for programs, Markdown for people, rewritten after every step."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from steps import Outcome, as_plain

SOFTWARE = "mpies", "torch", "triton", "transformers", "vllm", "numpy", "numba", "mpi4py"
REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS = "index,name,driver_version,memory.total,uuid"


def facts(pretended: bool) -> dict[str, Any]:
    """Of this machine: its GPUs, driver, versions, cores."""
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return {
        "GPUs": ["pretended: tensors on the CPU, emulated kernels"] if pretended else _gpus(),
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none",
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "sources": sources(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, kernel {platform.release()}",
        "versions": versions,
    }


def sources() -> str:
    """A digest of what is tested and of what tests it; a machine may have no git, or changes of its own."""
    found = hashlib.sha256()
    for folder in ("mpies", "configs", "tests"):
        for file in sorted((REPOSITORY / folder).rglob("*")):
            if file.suffix in (".py", ".yaml"):
                found.update(str(file.relative_to(REPOSITORY)).encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _gpus() -> list[str]:
    """As the driver's own tool lists them; as torch does, where that is not there, as on AMD's."""
    told = _output("nvidia-smi", f"--query-gpu={COLUMNS}", "--format=csv,noheader")
    if told != "unknown":
        return told.splitlines()
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def states(folder: Path, given: dict[str, Any]) -> dict[str, str]:
    """PART.STEP -> right, wrong or left out, as a report there has it of what `given` tells."""
    return {name: row["state"] for name, row in _rows(folder).items() if row.get("of") == _of(given)}


def _of(given: dict[str, Any]) -> str:
    """What a step's result depends on: sources, versions, GPUs, of which another of the kind is as good."""
    kinds = [gpu.rpartition(",")[0] or gpu for gpu in given["GPUs"]]
    what = [given["sources"], given["versions"], given["CUDA of torch"], given["python"], kinds]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "report.json"
    steps = json.loads(file.read_text())["steps"] if file.exists() else []
    return {f"{row['part']}.{row['step']}": row for row in steps}


def write(folder: Path, given: dict[str, Any], outcomes: list[Outcome]) -> None:
    """`report.json` and `report.md`. Steps of a report that is there stay, unless they were done again."""
    rows = _rows(folder)
    for outcome in outcomes:
        name = f"{outcome.part}.{outcome.step}"
        if outcome.state != "left out" or rows.get(name, {}).get("state", "left out") == "left out":
            rows.pop(name, None)
            rows[name] = {**as_plain(outcome), "of": _of(given), "sources": given["sources"]}
    steps, file = list(rows.values()), folder / "report.json"
    file.write_text(json.dumps({"facts": given, "steps": steps}, indent=1) + "\n")
    (folder / "report.md").write_text("\n".join(_lines(given, steps)) + "\n")


def _lines(given: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    lines = ["# mpies on a GPU", "", "| | |", "|---|---|"]
    for name, value in given.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        lines.append(f"| {name} | {'<br>'.join(value) if isinstance(value, list) else value} |")
    for part in dict.fromkeys(step["part"] for step in steps):
        mine = [step for step in steps if step["part"] == part]
        lines += ["", f"## {part}", "", "| step | | s |", "|---|---|---|"]
        lines += [f"| {s['what']} | {_state(s)}{_older(s, given)} | {s['seconds']:.0f} |" for s in mine]
        for step in mine:
            lines += _details(step)
    return lines


def _older(step: dict[str, Any], given: dict[str, Any]) -> str:
    """That a row is not of what the report's head tells."""
    return "" if step.get("of") == _of(given) else f" (not of these: sources {step.get('sources')})"


def _state(step: dict[str, Any]) -> str:
    first = step["why"].splitlines()[0] if step["why"] else ""
    return f"**{step['state']}**" + (f": {first}" if first else "")


def _details(step: dict[str, Any]) -> list[str]:
    lines = []
    if step["figures"]:
        lines += ["", f"{step['what']}:", "", "| | | | |", "|---|---|---|---|"]
        for figure in step["figures"]:
            value = figure["value"]
            text = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"| {figure['name']} | {text} | {figure['unit']} | {figure['verdict']} |")
    if step["state"] == "wrong":
        lines += ["", f"{step['step']}:", "", "```", *step["commands"], step["why"], "```"]
    return lines
