"""docs/settings.md lists every setting as the program knows it."""

from __future__ import annotations

import launching

from mpies.config import keys


def test_the_page_is_that_of_the_settings():
    page = launching.REPOSITORY / "docs" / "settings.md"
    assert page.read_text() == launching.load_script("settings").make_page(), "run python docs/settings.py"
    assert [key for key in keys() if f"\n| `{key}` | " not in page.read_text()] == []


def test_the_readme_names_every_setting():
    readme = (launching.REPOSITORY / "README.md").read_text().splitlines()
    missing = []
    for key in keys():
        section, _, name = key.partition(".")
        (row,) = (line for line in readme if line.startswith(f"| `{section}` |"))
        missing += [] if f"`{name}`" in row else [key]
    assert not missing
