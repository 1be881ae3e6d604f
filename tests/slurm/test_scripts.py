"""The job scripts as text: clean for shellcheck, short, and their Slurm options as the issue wants them."""

from __future__ import annotations

import re
import shutil
import subprocess

import launching
import pytest

JOBS = launching.REPOSITORY / "jobs"
SCRIPTS = sorted([*JOBS.glob("*.sh"), *JOBS.glob("*.sbatch")])


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here: apt install shellcheck")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        ["shellcheck", "--external-sources", *SCRIPTS], cwd=JOBS.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here: apt install shellcheck")
@pytest.mark.parametrize("section", ["post", "runscript", "test"])
def test_shellcheck_has_nothing_to_say_of_the_container(section):
    """Which is not built here: its shell parts are all that is checked."""
    text = (JOBS.parent / "containers" / "mpies.def").read_text()
    body = re.search(rf"^%{section}\n(.*?)(?=^%|\Z)", text, re.DOTALL | re.MULTILINE)[1]
    done = subprocess.run(
        ["shellcheck", "--shell=sh", "-"], input=body, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_container_copies_what_is_there():
    text = (JOBS.parent / "containers" / "mpies.def").read_text()
    files = re.search(r"^%files\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)[1]
    for line in files.splitlines():
        source, _ = line.split()
        assert (JOBS.parent / source).exists(), source


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_read_in_a_minute(script):
    assert len(script.read_text().splitlines()) <= 75


@pytest.mark.parametrize("script", sorted(JOBS.glob("*.sbatch")), ids=lambda script: script.name)
def test_a_job_that_may_take_long_is_signalled_before_its_end_and_requeued(script):
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text and "launch -m mpies." in text
    if "mpies.train" in text:
        for option in ("--signal=B:USR1@", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in text
