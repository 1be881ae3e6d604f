"""packaging/: recipes say of mpies what pyproject.toml says, so that neither can change alone."""

from __future__ import annotations

import re
import sys
from itertools import chain
from types import ModuleType
from typing import Any

import launching
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

import mpies

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = launching.REPOSITORY
PACKAGING = ROOT / "packaging"
SPACK = PACKAGING / "spack/spack_repo/mpies/packages"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Names of others for what PyPI calls by its own.
ALIASES = {"pytorch": "torch", "scipy-bundle": "numpy"}

Needs = dict[str, SpecifierSet]


def required(*extras: str) -> Needs:
    """What the project needs with these extras, with its Python; extras within extras are followed."""
    project = PROJECT["project"]
    needs = {"python": SpecifierSet(project["requires-python"])}
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    for requirement in map(Requirement, chain(*lists)):
        if requirement.name == "mpies":
            needs |= required(*requirement.extras)
        else:
            needs[canonicalize_name(requirement.name)] = requirement.specifier
    return needs


def build_requirements() -> Needs:
    requirements = map(Requirement, PROJECT["build-system"]["requires"])
    return {canonicalize_name(one.name): one.specifier for one in requirements}


def named(name: str) -> str:
    plain = canonicalize_name(name)
    return ALIASES.get(plain, plain)


# conda-forge


def conda_needs(lines: list[Any]) -> Needs:
    """'transformers >=5.4,<6' and so on; what names a part of the same recipe is left out."""
    words = (line.split(maxsplit=1) for line in lines if not line.startswith("${{ pin_subpackage"))
    return {named(name): SpecifierSet(re.sub(r"^(?=\d)", "==", "".join(rest))) for name, *rest in words}


@pytest.fixture(scope="module")
def conda() -> dict[str, Any]:
    text = (PACKAGING / "conda-forge/recipe.yaml").read_text()
    context = YAML(typ="safe").load(text)["context"]
    for key, value in context.items():
        text = text.replace("${{ " + key + " }}", value)
    return YAML(typ="safe").load(text)


def test_the_conda_recipe_needs_what_the_project_needs(conda):
    base, full = (output["requirements"] for output in conda["outputs"])
    assert conda_needs(base["run"]) == required()
    assert required() | conda_needs(full["run"]) == required("train")
    host = conda_needs(base["host"])
    assert {name: host[name] for name in build_requirements()} == build_requirements()
    assert conda["recipe"]["version"] == mpies.FALLBACK_VERSION


# EasyBuild


@pytest.fixture(scope="module")
def easyconfig() -> dict[str, Any]:
    (path,) = (PACKAGING / "easybuild").glob("*.eb")
    names: dict[str, Any] = {"SOURCE_PY3_WHL": "%(name)s-%(version)s-py3-none-any.whl"}
    exec(path.read_text(), names)
    chain = names["toolchain"]
    assert path.stem == f"{names['name']}-{names['version']}-{chain['name']}-{chain['version']}"
    return names


def test_the_easyconfig_has_what_the_project_needs(easyconfig):
    has = {named(name): version for name, version, *_ in easyconfig["dependencies"]}
    has |= {named(name): version for name, version, *_ in easyconfig["exts_list"]}  # these come first
    needs = required("train")
    assert needs.keys() - has.keys() == set()
    assert {name: has[name] for name in needs if has[name] not in needs[name]} == {}
    assert easyconfig["version"] == has["mpies"] == mpies.FALLBACK_VERSION


# Spack, whose own program no registry has: the files are run with names that note what is said.


class Said:
    """Spack's words, as a package file says them, each with what surrounds it."""

    def __init__(self) -> None:
        self.depends: list[tuple[str, str]] = []  # a spec, and the variant that wants it
        self.versions: list[str] = []
        self._around: list[str] = []

    def depends_on(self, spec: str, **_) -> None:
        self.depends.append((spec, " ".join(self._around)))

    def version(self, number: str, **_) -> None:
        self.versions.append(number)

    def when(self, condition: str) -> Said:
        self._around.append(condition)
        return self

    def default_args(self, when: str = "", **_) -> Said:
        return self.when(when)

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None:
        self._around.pop()


def module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(names)
    return made


def spack_package(name: str, monkeypatch) -> Said:
    said = Said()
    words = {word: getattr(said, word) for word in ("depends_on", "version", "when", "default_args")}
    words |= {word: lambda *_, **__: None for word in ("license", "variant", "maintainers")}
    builtin = "spack_repo.builtin"
    classes = {"PyHuggingfaceHub": object, "PyRegex": object, "PythonPackage": object}
    for place in ("spack", "spack_repo", builtin, f"{builtin}.build_systems", f"{builtin}.packages"):
        monkeypatch.setitem(sys.modules, place, module(place))
    monkeypatch.setitem(sys.modules, "spack.package", module("spack.package", **words))
    places = ["build_systems.python", f"packages.{name}.package"]
    for place in places:
        monkeypatch.setitem(sys.modules, f"{builtin}.{place}", module(place, **classes))
    path = SPACK / name / "package.py"
    names: dict[str, Any] = {"__file__": str(path), "__name__": name}
    exec(compile(path.read_text(), path, "exec"), names)
    assert names.get("CLONE", ROOT) == ROOT
    return said


def spack_range(spec: str) -> tuple[str, SpecifierSet]:
    """'py-transformers@5.4:5' is transformers >=5.4,<6: Spack's ends include all that begins with them."""
    name, _, versions = spec.partition("@")
    lowest, _, highest = versions.partition(":")
    bounds = [f">={lowest}"] if lowest else []
    if highest:
        *front, last = highest.split(".")
        bounds.append("<" + ".".join([*front, str(int(last) + 1)]))
    return named(name.removeprefix("py-")), SpecifierSet(",".join(bounds))


def test_the_spack_package_needs_what_the_project_needs(monkeypatch):
    said = spack_package("py_mpies", monkeypatch)
    assert said.versions == [mpies.FALLBACK_VERSION]
    build = {"setuptools", "setuptools-scm"}
    for extras, variants in {(): "", ("replay",): "+replay", ("train",): "+replay+train"}.items():
        wanted = {"", *re.findall(r"\+\w+", variants)}
        needs = dict(spack_range(spec) for spec, around in said.depends if around.strip() in wanted)
        assert needs.pop("setuptools") == build_requirements()["setuptools"]
        assert {name: needs[name] for name in needs if name not in build} == required(*extras)
    analyze = dict(spack_range(spec) for spec, around in said.depends if around.strip() == "+analyze")
    assert required() | analyze == required("analyze")


def test_what_spack_lacks_is_new_enough(monkeypatch):
    transformers = spack_package("py_transformers", monkeypatch)
    assert transformers.versions[0] in required("train")["transformers"]
    needs = dict(spack_range(spec) for spec, _ in transformers.depends)
    for name in ("huggingface-hub", "regex"):
        said = spack_package(f"py_{name.replace('-', '_')}", monkeypatch)
        assert said.versions[0] in needs[name]


# Apptainer


def test_the_container_holds_what_is_there():
    text = (ROOT / "containers/mpies.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == ["files", "post", "environment", "runscript", "test"]
    copied = {line.split()[0] for line in sections["files"].splitlines() if line.strip()}
    # The package itself is elsewhere where a distribution is tried.
    assert "mpies" in copied and [name for name in copied - {"mpies"} if not (ROOT / name).exists()] == []
    extras = re.findall(r"/opt/mpies\[(\w+)\]", sections["post"])
    assert extras and set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    python = re.search(r"^From: python:([\d.]+)-", text, re.MULTILINE)[1]
    assert python in required()["python"]


def test_the_readme_names_every_recipe():
    page = (PACKAGING / "README.md").read_text()
    files = [path for path in sorted(PACKAGING.rglob("*")) if path.suffix in {".eb", ".py", ".yaml"}]
    folders = {path.relative_to(PACKAGING).parts[0] for path in files}
    assert {folder for folder in folders if f"({folder}/" not in page} == set()
