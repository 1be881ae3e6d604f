"""The option --max-skips of pytest, for conftest.py: how many tests may be skipped."""

from __future__ import annotations

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--max-skips",
        type=int,
        metavar="N",
        help="fail if more than N tests, or files of tests, are skipped: what never runs proves nothing",
    )


def too_many_skips(config) -> str:
    """What is wrong with the number of skipped tests; empty if nothing is."""
    bound, terminal = config.getoption("--max-skips"), config.pluginmanager.getplugin("terminalreporter")
    if bound is None or terminal is None:
        return ""
    skips = len(terminal.stats.get("skipped", ()))
    if skips <= bound:
        return ""
    return f"{skips} tests were skipped, but --max-skips allows {bound}; -rs lists them, with reasons"


def pytest_sessionfinish(session, exitstatus):
    """With xdist, the process that distributes the tests counts: its workers have no terminal."""
    passed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if passed and too_many_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if message := too_many_skips(config):
        terminalreporter.write_line(f"ERROR: {message}", red=True)
