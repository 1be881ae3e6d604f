"""What holds of the whole package's text: a name has one meaning, imports keep it, and pieces are small."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import launching

PACKAGE = launching.REPOSITORY / "mpies"
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

LINES_OF_A_MODULE, LINES_OF_A_FUNCTION, LINES_OF_THE_MEDIAN = 400, 50, 150

# Everybody calls these so.
CUSTOMARY = {"numpy as np", "pandas as pd", "triton.language as tl", "llvmlite.binding as llvm"}
CUSTOMARY |= {"triton.experimental.gluon.language as gl"}


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def defined_types(tree: ast.Module) -> Iterator[str]:
    """Classes, and names for types such as `Row = dict[str, Any]`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and re.match(r"[A-Z]\w*[a-z]", target.id):
                yield target.id


def renamed_imports(tree: ast.Module) -> Iterator[str]:
    """'module.name as other', of each import that gives a name of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            place = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{place}{alias.name} as {alias.asname}" for alias in node.names if alias.asname)


def test_no_type_has_the_name_of_another():
    places: dict[str, list[str]] = {}
    for name in MODULES:
        for defined in defined_types(tree_of(name)):
            places.setdefault(defined, []).append(name)
    assert {defined: where for defined, where in places.items() if len(where) > 1} == {}


def test_imports_keep_their_names():
    renamed = {name: set(renamed_imports(tree_of(name))) - CUSTOMARY for name in MODULES}
    assert {name: imports for name, imports in renamed.items() if imports} == {}


def test_modules_are_small():
    lines = {name: lines_of(path) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > LINES_OF_A_MODULE} == {}
    assert statistics.median(lines.values()) <= LINES_OF_THE_MEDIAN


def test_functions_are_small():
    lines = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name in MODULES
        for node in ast.walk(tree_of(name))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {function: count for function, count in lines.items() if count > LINES_OF_A_FUNCTION} == {}


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())
