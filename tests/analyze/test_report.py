"""The HTML page, in a real browser: it shows what it should, and asks nobody for anything."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import launching
import made_up
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from mpies.analyze.commands import main
from mpies.analyze.report import thinned
from mpies.analyze.run import open_run
from mpies.runfile import RunFile

DATA = launching.DATA
HOSTILE = (
    "</pre><script>document.title='taken'</script><img src='https://example.org/x.png' onerror='alert(1)'>"
)
# A browser that is installed, by name; MPIES_BROWSER overrides.
BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)


@pytest.fixture
def page(tmp_path) -> Path:
    """A page about two runs, one with an answer and a prompt that want to be more than text."""
    path = made_up.write_run(tmp_path / "other<b>run", generations=30, kl=0.4)
    log = RunFile.reopen(path, 30)
    row, samples = made_up.evaluation(30, 0, None)
    hostile = {**samples[0], "prompt": HOSTILE, "completion": HOSTILE}
    log.add_evaluation({**row, "split": "train"}, [hostile])
    log.close()
    made_up.tell(path, {0: [0.0, 0.0, 1.0], 30: [1.0, 1.0, 0.0]}, **{"cosine_<b>": 0.5})
    output = tmp_path / "page.html"
    assert main(["report", str(DATA / "schema-1.h5"), str(path), "--output", str(output)]) == 0
    return output


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [os.environ.get("MPIES_BROWSER"), *map(shutil.which, BROWSERS)]
    program = next(filter(None, found), None)
    if program is None:
        pytest.skip("there is no Chromium here: apt install chromium, or set MPIES_BROWSER")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox cannot be had by root, as in a container; what it opens is our own page.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.render
def test_in_a_browser(page, browser):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert said == []
    assert tab.title() == "mpies: 2 runs"
    widths = tab.evaluate("Array.from(document.images).map(image => image.naturalWidth)")
    assert len(widths) == 3 and all(widths), "a figure of both, and one of each"
    assert tab.evaluate("document.scripts.length") == 0
    headings = tab.locator("h2").all_inner_texts()
    assert headings == ["Overview", "Comparison", "schema-1", "other<b>run"]
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    answers = tab.locator("pre").all_inner_texts()
    assert HOSTILE in answers, "as text"
    for answer in open_run(DATA / "schema-1.h5").samples.completion:
        assert answer in answers
    for width in (1280, 390):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling"


@pytest.mark.render
def test_nothing_is_loaded_or_run(page):
    """Where no browser is: by its text."""
    text = page.read_text()
    assert "default-src 'none'" in text
    assert "<script" not in text
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", re.sub(r"&lt;.*?&gt;", "", text))
    assert "2 fixed, 1 broken, net +1 of 3, p 1" in text and "&lt;b&gt; 0.50 (25 % of it)" in text
    assert len(links) >= 5
    assert all(link.startswith(("data:", "#run")) for link in links)


def test_a_run_that_just_began(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=0)
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 0
    assert "0 of 0 generations" in (tmp_path / "page.html").read_text()


@pytest.mark.render
def test_a_run_that_was_evaluated_later(tmp_path):
    path = made_up.write_run(tmp_path / "run", generations=20, evaluate_every=1)
    for generation in (10, 20):
        made_up.evaluate_later(path, generation, samples=2, **{"pass@2": 0.75})
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count("<td>2 samples at T=0.7, seed 42</td><td>pass@2 0.75 +- 0.5</td>") == 2
    for g, i, s in ((g, i, s) for g in (10, 20) for i in (0, 1) for s in (0, 1)):
        assert f"<pre>sampled {g}.{i}.{s}</pre>" in text
    assert "<pre>answer 0.0</pre>" in text and "<pre>answer 20.0</pre>" in text


def test_thinned_keeps_first_and_last():
    assert thinned(list(range(5))) == list(range(5))
    kept = thinned(list(range(1000)))
    assert len(kept) == 12 and (kept[0], kept[-1]) == (0, 999) and kept == sorted(set(kept))
