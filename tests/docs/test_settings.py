"""docs/settings.md lists every setting as the program knows it."""

from __future__ import annotations

import launching

from mpies.config import keys


def test_the_page_is_that_of_the_settings():
    page = launching.REPOSITORY / "docs" / "settings.md"
    assert page.read_text() == launching.load_script("settings").make_page(), "run python docs/settings.py"
    assert [key for key in keys() if f"\n| `{key}` | " not in page.read_text()] == []
