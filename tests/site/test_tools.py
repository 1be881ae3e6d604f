"""Recipes of packaging/, as the tools that they are for read them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import launching
import pytest

import mpies

PACKAGING = launching.REPOSITORY / "packaging"
# Prints what each package of the recipe comes to.
RENDER = """
import json, sys
from rattler_build import RenderConfig, Stage0Recipe, VariantConfig
rendered = Stage0Recipe.from_file(sys.argv[1]).render(VariantConfig(), RenderConfig())
print(json.dumps([variant.recipe.to_dict() for variant in rendered]))
"""


def test_rattler_build_renders_the_conda_recipe(tools, tmp_path):
    recipe = PACKAGING / "conda-forge/recipe.yaml"
    packages = json.loads(launching.output_of(tools / "python", "-c", RENDER, recipe, cwd=tmp_path))
    assert [package["package"] for package in packages] == [
        {"name": name, "version": mpies.FALLBACK_VERSION} for name in ("mpies-base", "mpies")
    ]
    assert all(package["build"]["noarch"] == "python" for package in packages)
    base, full = (package["requirements"]["run"] for package in packages)
    assert "python >=3.10" in base and "transformers >=5.4,<6" in full
    assert {"pin_subpackage": {"name": "mpies-base", "exact": True}} in full


def test_easybuild_finds_all_that_the_easyconfig_names(tools, tmp_path):
    """A dry run: every dependency, and theirs, is an easyconfig of EasyBuild's own collection."""
    found = next(Path("/usr/lib").glob("*/modulecmd.tcl"), None)
    if found is None:
        pytest.skip("EasyBuild wants a module tool: apt install environment-modules")
    (tmp_path / "libexec").mkdir()
    (tmp_path / "libexec/modulecmd.tcl").symlink_to(found)
    (recipe,) = (PACKAGING / "easybuild").glob("*.eb")
    robot = f"{recipe.parent}:{tools.parent}/easybuild/easyconfigs"
    options = ["--modules-tool=EnvironmentModules", "--module-syntax=Tcl", f"--prefix={tmp_path}"]
    options += ["--allow-use-as-root-and-accept-consequences", f"--robot={robot}", "--dry-run"]
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    said = launching.output_of(
        tools / "eb", *options, recipe, cwd=tmp_path, PATH=path, MODULESHOME=str(tmp_path)
    )
    planned = [line.split("(module: ")[1].rstrip(")") for line in said.splitlines() if "(module: " in line]
    assert planned[-1] == f"mpies/{mpies.FALLBACK_VERSION}-foss-2025a"
    assert len(planned) > 100 and any(name.startswith("PyTorch/") for name in planned)
