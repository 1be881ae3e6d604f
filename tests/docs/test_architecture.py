"""docs/architecture.md names what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import launching

import mpies

PACKAGE = Path(mpies.__file__).parent
PAGE = launching.REPOSITORY / "docs" / "architecture.md"


def load_script():
    spec = importlib.util.spec_from_file_location("modules", launching.REPOSITORY / "docs" / "modules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_modules_is_that_of_the_code():
    script = load_script()
    assert PAGE.read_text() == script.page_with(script.make_table(PACKAGE)), "run python docs/modules.py"


def test_every_module_says_what_it_is():
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", load_script().make_table(PACKAGE), re.MULTILINE)
    assert len(rows) > 100
    assert not [name for name, about in rows if len(about) < 10]


def test_every_file_that_the_walks_name_is_there():
    walks = PAGE.read_text().split("## Every module")[0]
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", walks))
    assert len(named) > 20
    known = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    bare = {name for name in named if "/" not in name}
    assert not [name for name in named - bare if name not in known]
    assert not [name for name in bare if not any(k == name or k.endswith("/" + name) for k in known)]
