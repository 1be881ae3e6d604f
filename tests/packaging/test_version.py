"""mpies.__version__ is that of the sources that run; what a wheel has to hold is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import launching
import pytest

import mpies

FALLBACK = mpies.FALLBACK_VERSION
INSTALLED = "9.8.7"


def said(*folders: Path, site: bool = False) -> str:
    """The version that a Python says whose path begins with the folders, without any other mpies."""
    code = f"import sys; sys.path[:0] = {list(map(str, folders))}; import mpies; print(mpies.__version__)"
    words = [sys.executable, "-I", *([] if site else ["-S"]), "-c", code]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def sources(folder: Path) -> Path:
    """A folder with the package, as in a checkout; only the part that knows the version."""
    (folder / "mpies").mkdir(parents=True)
    shutil.copy(mpies.__file__, folder / "mpies")
    return folder


def installation(folder: Path, **origin) -> Path:
    """What pip leaves of an installation; `origin` says where it came from, if not from an index."""
    about = folder / f"mpies-{INSTALLED}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mpies\nVersion: {INSTALLED}\n")
    if origin:
        (about / "direct_url.json").write_text(json.dumps(origin))
    return folder


def test_sources_that_are_not_installed(tmp_path):
    assert said(sources(tmp_path / "checkout")) == FALLBACK


def test_an_installed_wheel(tmp_path):
    assert said(installation(sources(tmp_path / "site"))) == INSTALLED


def test_a_folder_that_was_installed(tmp_path):
    """By pip install FOLDER: the copy is what runs, and so the folder itself is of no known version."""
    folder = sources(tmp_path / "checkout")
    site = installation(sources(tmp_path / "site"), url=folder.as_uri(), dir_info={})
    assert said(site) == INSTALLED
    assert said(folder, site) == FALLBACK


@pytest.mark.parametrize("name", ["checkout", "a folder; with 100% signs"])
def test_an_editable_installation(tmp_path, name):
    folder = sources(tmp_path / name)
    site = installation(tmp_path / "site", url=folder.as_uri(), dir_info={"editable": True})
    assert said(folder, site) == INSTALLED


def test_sources_before_another_installation_do_not_take_its_version(tmp_path):
    other = sources(tmp_path / "other")
    editable = installation(tmp_path / "editable", url=other.as_uri(), dir_info={"editable": True})
    wheel = installation(sources(tmp_path / "wheel"))
    assert said(sources(tmp_path / "mine"), editable, wheel) == FALLBACK
    assert said(tmp_path / "mine", wheel, site=True) == FALLBACK


def test_what_the_build_falls_back_to_is_what_the_sources_say():
    text = (launching.REPOSITORY / "pyproject.toml").read_text()
    assert re.search(r'^fallback_version = "(.*)"$', text, re.MULTILINE)[1] == FALLBACK


def test_a_version_is_a_version():
    assert re.match(r"\d+\.\d+", mpies.__version__)


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "config/quickstart.yaml",
        "analyze/report.html",
        "tasks/math_sample.jsonl",
        "tasks/questions.jsonl",
    ],
)
def test_files_that_are_no_modules_come_along(name):
    assert resources.files("mpies").joinpath(name).is_file()
