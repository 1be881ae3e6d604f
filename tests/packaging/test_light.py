"""Without extras, as `pip install mpies` leaves it: commands work, or say in one line what to install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import launching
import pytest
from systems import python_on_another_system, python_without

from mpies import extras

pytestmark = pytest.mark.lengthy

HERE = Path(__file__).parent
spec = util.spec_from_file_location("light", HERE / "light.py")
assert spec and spec.loader
light = util.module_from_spec(spec)
spec.loader.exec_module(light)

ABSENT = [*extras.MODULES["train"], "tokenizers", "pandas", "matplotlib", "jinja2", "pyarrow", "tensorboardX"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    for name, value in launching.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("words", "status", "end"), light.CASES, ids=lambda case: str(case)[:60])
def test_commands_without_extras(words, status, end, tmp_path):
    name, *rest = words
    assert not light.fault([f"mpies.{name}", *rest], status, end, python_without(*ABSENT))
    assert not list(tmp_path.iterdir()), "nothing half done"


def test_extras_bring_what_the_commands_ask_for():
    text = (launching.REPOSITORY / "pyproject.toml").read_text()
    for name, modules in extras.MODULES.items():
        packages = re.search(rf"^{name} = \[(.*)\]$", text, re.MULTILINE)[1]
        brought = {re.split("[>=<]", package.strip(' "'))[0] for package in packages.split(", ")}
        if "mpies[replay]" in brought:
            brought = brought - {"mpies[replay]"} | set(extras.REPLAY)
        assert brought == set(modules)


def test_the_oldest_versions_are_those_that_are_allowed():
    lists = [launching.REPOSITORY / name for name in ("pyproject.toml", "constraints-oldest.txt")]
    project, oldest = (path.read_text() for path in lists)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)[,"]', project.split("[tool.setuptools_scm]")[0]))
    held = dict(re.findall(r"^([\w-]+)==([\d.]+)$", oldest, re.MULTILINE))
    for name in ("torch", "transformers", "h5py", "pydantic", "mpi4py", "matplotlib"):
        assert (held[name] + ".").startswith(bounds[name] + "."), name


@pytest.mark.parametrize(
    ("words", "status", "end"),
    [
        (["analyze", "summary", light.RUN], 0, ""),
        (["replay", "--help"], 0, ""),
    ],
    ids=["summary", "help"],
)
def test_a_laptop_with_another_system(words, status, end):
    name, *rest = words
    python = python_on_another_system()
    assert not light.fault([f"mpies.{name}", *rest], status, end, python)


@pytest.mark.parametrize("command", ["train", "check", "probe", "evaluate", "bench", "replay", "analyze"])
def test_a_reader_of_the_help_may_leave(command):
    """As `| head -1` does: the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", f"mpies.{command}", "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
