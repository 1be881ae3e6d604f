"""These tests use a cluster's staff's tools and Sphinx, from an environment of their own: make test-site"""

from __future__ import annotations

import os
from pathlib import Path

import launching
import pytest


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of programs of that environment."""
    folder = launching.REPOSITORY / os.environ.get("SITE_VENV", ".venv-site") / "bin"
    if not (folder / "sphinx-build").exists():
        pytest.skip(f"there are no tools in {folder}: make test-site")
    return folder
