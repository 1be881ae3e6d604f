"""--max-skips: tests that are skipped are counted, and too many of them fail the session."""

from __future__ import annotations

from pathlib import Path

import launching
import pytest

pytestmark = pytest.mark.lengthy

TESTS = """\
import pytest

@pytest.mark.skip(reason="for a reason")
@pytest.mark.parametrize("number", range(3))
def test_left_out(number):
    pass

def test_run():
    pass
"""
WHOLE_FILE = "import pytest; pytest.importorskip('no_such_module')"


@pytest.fixture
def session(tmp_path):
    """session(arguments) -> how pytest ended on two files that skip four tests."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text("from skips import *")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_all.py").write_text(WHOLE_FILE)
    helpers = Path(launching.__file__).parent
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {helpers}\n")

    def run(*arguments: str):
        return launching.python("-m", "pytest", "-p", "no:cacheprovider", *arguments, "tests", cwd=tmp_path)

    return run


@pytest.mark.parametrize("processes", ["0", "2"])
def test_more_skips_than_allowed_fail_the_session(session, processes):
    ended = session("--max-skips", "3", "-n", processes)
    assert ended.returncode == 1, ended.stdout
    assert "1 passed, 4 skipped" in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if line.startswith("ERROR")]
    assert lines == ["ERROR: 4 tests were skipped, but --max-skips allows 3; -rs lists them, with reasons"]


@pytest.mark.parametrize("arguments", [("--max-skips", "4"), ()], ids=["allowed", "no bound"])
def test_skips_within_the_bound_pass(session, arguments):
    ended = session(*arguments)
    assert ended.returncode == 0, ended.stdout
    assert "ERROR" not in ended.stdout


def test_a_session_of_nothing_but_skips_says_so(session):
    """Pytest's own exit code, 5, is for no tests at all; here one file was left out."""
    ended = session("--max-skips", "0", "--deselect", "tests/test_some.py")
    assert ended.returncode == 1, ended.stdout
    assert "ERROR: 1 tests were skipped" in ended.stdout


def test_a_failing_session_keeps_its_exit_code(session, tmp_path):
    (tmp_path / "tests" / "test_bad.py").write_text("syntax error")
    ended = session("--max-skips", "0")
    assert ended.returncode == 2, ended.stdout
