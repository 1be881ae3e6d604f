"""docs/architecture.md names what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import launching

import mpies

PACKAGE = Path(mpies.__file__).parent
PAGE = launching.REPOSITORY / "docs" / "architecture.md"
# Names of files that users write, in examples.
EXAMPLES = {"api.py"}


def test_the_table_of_modules_is_that_of_the_code():
    script = launching.load_script("modules")
    assert PAGE.read_text() == script.page_with(script.make_table(PACKAGE)), "run python docs/modules.py"


def test_every_module_says_what_it_is():
    rows = re.findall(
        r"^\| `([^`]+)` \| (.*) \|$", launching.load_script("modules").make_table(PACKAGE), re.MULTILINE
    )
    assert len(rows) > 100
    assert not [name for name, about in rows if len(about) < 10]


def unknown_files(text: str) -> set[str]:
    """The modules that a text names which are not there; a name without a folder may be in any."""
    named = set(re.findall(r"(?<![\w./-])(?:[a-z_]+/)*[a-z_]+\.py\b", text))
    known = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    known |= {name.rpartition("/")[2] for name in known}
    return named - known - EXAMPLES


def docstrings(path: Path) -> str:
    """Those of a module, its classes and functions, and those below attributes."""
    texts = (
        node.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    return "\n".join(text for text in texts if isinstance(text, str))


def test_every_file_that_the_walks_name_is_there():
    walks = PAGE.read_text().split("## Every module")[0]
    assert len(re.findall(r"`[a-z_/]+\.py`", walks)) > 20
    assert not unknown_files(walks)


def test_every_file_that_a_docstring_names_is_there():
    named = {path: docstrings(path) for path in PACKAGE.rglob("*.py")}
    assert sum(".py" in text for text in named.values()) > 5
    unknown = {str(path.relative_to(PACKAGE)): unknown_files(text) for path, text in named.items()}
    assert {path: names for path, names in unknown.items() if names} == {}


def test_the_floors_are_those_that_imports_keep():
    """The table, from the top, beside the layers of import-linter."""
    table = PAGE.read_text().split("| floor | rooms |")[1].split("\n\n")[0].splitlines()[2:]
    floors = [set(re.findall(r"`(\w+)/?`", row.split("|")[2])) for row in table]
    config = (launching.REPOSITORY / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[(.*?)^\]", config, re.MULTILINE | re.DOTALL)[1]
    assert floors == [set(layer.split(" | ")) for layer in re.findall(r'"(.*)"', layers)]
