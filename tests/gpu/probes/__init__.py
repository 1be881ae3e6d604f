"""Programs that steps run on the GPU: `--json FILE` gets the figures that they find."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from steps import Figure


def parser(name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m probes.{name}")
    made.add_argument("--json", type=Path, required=True)
    return made


def write(path: Path, figures: list[Figure]) -> None:
    path.write_text(json.dumps([asdict(figure) for figure in figures]))


def verdict(right: bool) -> str:
    return "right" if right else "wrong"
