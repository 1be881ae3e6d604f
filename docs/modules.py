"""Write the table of all modules into docs/architecture.md: python docs/modules.py"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mpies"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules -->\n", "<!-- end of modules -->\n"


def make_table(package: Path = PACKAGE) -> str:
    """A row per module of the package, a package's own line first."""
    lines = ["| module | what it is |", "|---|---|"]
    for path in sorted(package.rglob("*.py"), key=lambda path: _place(path.relative_to(package))):
        name = str(path.relative_to(package)).removesuffix("__init__.py")
        about = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{name or 'mpies'}` | {about.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def page_with(table: str) -> str:
    """The page with this table in its place."""
    head, rest = PAGE.read_text().split(BEGIN)
    return head + BEGIN + table + END + rest.split(END)[1]


def _place(path: Path) -> tuple[bool, str, bool, str]:
    """Modules of the package itself first, then room after room."""
    room = path.parent
    return room != Path("."), str(room), path.name != "__init__.py", path.name


if __name__ == "__main__":
    PAGE.write_text(page_with(make_table()))
