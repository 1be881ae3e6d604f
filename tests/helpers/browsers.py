"""A Chromium that is installed, for tests that open pages."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest

# By name; MPIES_BROWSER overrides.
BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)


@contextlib.contextmanager
def started():
    """A playwright browser. Skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [os.environ.get("MPIES_BROWSER"), *map(shutil.which, BROWSERS)]
    program = next(filter(None, found), None)
    if program is None:
        pytest.skip("there is no Chromium here: apt install chromium, or set MPIES_BROWSER")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox cannot be had by root, as in a container; what it opens are our own pages.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
