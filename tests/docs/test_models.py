"""docs/models.md says what starts with these models come to."""

from __future__ import annotations

import launching
import pytest
import transformers
import zoo

PAGE = launching.REPOSITORY / "docs" / "models.md"


def test_the_page_knows_the_whole_zoo():
    page = PAGE.read_text()
    assert {
        name for name in zoo.ARCHITECTURES if f"\n| `{name.replace(':', '`, form `')}` | " not in page
    } == set()


@pytest.mark.slow
def test_the_page_is_that_of_its_version_of_transformers():
    page = PAGE.read_text()
    if f"with transformers {transformers.__version__}:" not in page:
        pytest.skip(f"docs/models.md is of another version than transformers {transformers.__version__}")
    assert page == launching.load_script("models").make_page(), "run make models"
