"""The report: JSON for programs, Markdown for people, rewritten after every step."""

from __future__ import annotations

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
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, kernel {platform.release()}",
        "versions": versions,
    }


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


def write(folder: Path, given: dict[str, Any], outcomes: list[Outcome]) -> None:
    """`report.json` and `report.md`. Steps of a report that is there stay, unless they were done again."""
    file = folder / "report.json"
    done = {(outcome.part, outcome.step) for outcome in outcomes}
    before = json.loads(file.read_text())["steps"] if file.exists() else []
    kept = [row for row in before if (row["part"], row["step"]) not in done]
    steps = [*kept, *map(as_plain, outcomes)]
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
        lines += [f"| {s['what']} | {_state(s)} | {s['seconds']:.0f} |" for s in mine]
        for step in mine:
            lines += _details(step)
    return lines


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
