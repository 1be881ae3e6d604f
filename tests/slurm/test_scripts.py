"""The job scripts as text: clean for shellcheck, short, and their Slurm options as the issue wants them."""

from __future__ import annotations

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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_read_in_a_minute(script):
    assert len(script.read_text().splitlines()) <= 65


@pytest.mark.parametrize("script", sorted(JOBS.glob("*.sbatch")), ids=lambda script: script.name)
def test_a_job_that_may_take_long_is_signalled_before_its_end_and_requeued(script):
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text and "launch -m mpies." in text
    if "mpies.train" in text:
        for option in ("--signal=B:USR1@", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in text
