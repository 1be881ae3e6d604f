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

from mpies import extras

HERE = Path(__file__).parent
spec = util.spec_from_file_location("light", HERE / "light.py")
assert spec and spec.loader
light = util.module_from_spec(spec)
spec.loader.exec_module(light)

ABSENT = [*extras.MODULES["train"], "tokenizers", "pandas", "matplotlib", "jinja2", "pyarrow", "tensorboardX"]
# What a system without POSIX lacks.
FOREIGN = ["fcntl", "resource", "pwd", "grp", "termios"]
PYTHON = """
import os, runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{more}
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def python_without(*absent: str, more: str = "") -> list[str]:
    """The start of a command: Python, as if these modules were not installed."""
    return [sys.executable, "-c", PYTHON.format(absent=absent, more=more)]


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


@pytest.mark.parametrize("command", ["train", "check", "evaluate", "bench", "replay", "analyze"])
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
