"""The documentation as pages: make site

Sphinx reads the Markdown where it lies, README and all, so that a link means the same here and on any
forge. It checks every link and anchor (MyST, `-W`), makes downloads of linked files of the source, and its
search works on pages that are opened from a disk. MkDocs and Zensical read one folder.
"""

from __future__ import annotations

import mpies

project = "mpies"
author = "the authors of mpies"
version = release = mpies.__version__.partition("+")[0]

extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "docs/*.md", "configs/*.md", "examples/**/*.md", "packaging/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "**/*.egg-info", "mpies", "tests", "docs/results"]

CONTENTS = {
    "Training": "docs/settings docs/tasks docs/environments docs/models docs/engines docs/probe"
    " configs/README docs/clusters",
    "After training": "docs/run-file docs/analysis docs/evaluation",
    "How good it is": "docs/results docs/conciseness docs/char_count"
    " examples/char_count/README examples/environments/README docs/exactness docs/performance docs/gpu",
    "At a site": "packaging/README",
    "The project": "docs/architecture CONTRIBUTING CHANGELOG SECURITY",
}

# Anchors as a forge makes them, of every heading that pages link to.
myst_heading_anchors = 4
# Indented blocks are commands, Python and YAML alike.
highlight_language = "none"
# Quotes are as one types them.
smartquotes = False

html_theme = "furo"
html_title = f"mpies {version}"
html_copy_source = False
html_show_copyright = False
# It is fetched from the pages, which a browser refuses for those on a disk.
html_show_search_summary = False
# A folder's page is index.html.
html_additional_pages = {"index": "index.html"}
templates_path = ["templates"]


def setup(app):
    app.connect("source-read", add_contents)


def add_contents(app, page: str, source: list[str]) -> None:
    """The table of contents, which a forge does not know, at the end of the README."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += (
                f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages.split()) + "\n```\n"
            )
