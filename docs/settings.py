"""Write docs/settings.md, a table of all settings: python docs/settings.py"""

from __future__ import annotations

from pathlib import Path

from mpies.config.allowed import allowed
from mpies.config.reading import shown
from mpies.config.section import Role
from mpies.config.settings import SECTIONS, role_of

PAGE = Path(__file__).resolve().parent / "settings.md"
HEAD = """# Settings

Made by `python docs/settings.py` from [`mpies/config/settings.py`](../mpies/config/settings.py), which is
what checks them; a test compares. A YAML file has them by section; on the command line, `section.key=value`.
`python -m mpies.train --help` says the same.

The last column tells what may differ when a run goes on: *stays*: refused if it does, since it changes what
is computed; *data*: may be moved, its contents are compared; *job*: where, how and how long, which changes no
result.
"""
CHANGES = {Role.RESULT: "stays", Role.DATA: "data", Role.JOB: "job"}


def make_page() -> str:
    return HEAD + "".join(_section(name) for name in SECTIONS)


def _section(name: str) -> str:
    section = SECTIONS[name]
    lines = [f"\n## {name}\n", f"{section.__doc__}\n"]
    lines += ["| setting | meaning | allowed | default | going on |", "|---|---|---|---|---|"]
    for key, field in section.model_fields.items():
        default = "required" if field.is_required() else f"`{shown(field.default)}`"
        cells = (str(field.description), allowed(field), default)
        full = f"{name}.{key}"
        about = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| `{full}` | {about} | {CHANGES[role_of(full)]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
