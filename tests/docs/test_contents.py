"""The contents of the documentation's pages, which only a forge's reader does without."""

from __future__ import annotations

import runpy

import launching


def test_every_text_that_is_a_page_is_in_the_contents_once():
    made = runpy.run_path(str(launching.REPOSITORY / "docs" / "conf.py"))
    folder = launching.REPOSITORY
    texts = [p.relative_to(folder) for pattern in made["include_patterns"] for p in folder.glob(pattern)]
    listed = [name for names in made["CONTENTS"].values() for name in names.split()]
    hidden = ("build", "dist", "runs")  # what a checkout has beside its own
    kept = (p for p in texts if p.parts[0] not in hidden and not p.parts[0].startswith("."))
    assert sorted([*listed, "README"]) == sorted({str(p.with_suffix("")) for p in kept})
