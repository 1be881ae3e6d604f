"""The documentation as pages: built with every link checked, complete, and usable without a network."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import browsers
import launching
import pytest

from mpies.config import keys
from mpies.runfile import ALL_TABLES

SOURCES = [path for pattern in ("*.md", "docs/*.md") for path in launching.REPOSITORY.glob(pattern)]


def build(tools: Path, folder: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    words = [tools / "python", "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "doctrees"]
    words += ["-c", launching.REPOSITORY / "docs", *options, launching.REPOSITORY, folder / "html"]
    environment = {**os.environ, "PYTHONPATH": str(launching.REPOSITORY)}
    return subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def pages(tools, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(tools, folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.fixture
def browser():
    with browsers.started() as browser:
        yield browser


def test_every_text_is_a_page_and_in_the_contents(pages):
    front = (pages / "README.html").read_text()
    for path in SOURCES:
        page = path.relative_to(launching.REPOSITORY).with_suffix(".html")
        assert (pages / page).is_file(), page
        assert page.name == "README.html" or f'href="{page}"' in front, page


def test_every_setting_and_every_column_of_the_run_file_is_on_a_page(pages):
    settings = (pages / "docs/settings.html").read_text()
    assert [key for key in keys() if f">{key}<" not in settings] == []
    layout = (pages / "docs/run-file.html").read_text()
    columns = {column.name for table in ALL_TABLES.values() for column in table}
    assert [name for name in sorted(columns) if f">{name}<" not in layout] == []


def test_in_a_browser(pages, browser):
    """As a laptop without a network opens them, from its disk; with a search that finds."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((pages / "index.html").as_uri())
    tab.wait_for_url("**/README.html")
    assert tab.locator("h1").inner_text().startswith("mpies")
    tab.locator("nav, aside").get_by_role("link", name="Settings", exact=False).first.click()
    assert "es.sigma" in tab.locator("#es table").inner_text()
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    tab.goto((pages / "search.html").as_uri() + "?q=collective_timeout")
    found = tab.locator("#search-results li a")
    found.first.wait_for()
    assert any("settings.html" in link.get_attribute("href") for link in found.all())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert said == []
