"""Settings from YAML and `section.key=value`, and what is said of those that cannot be.

    settings = load(["config.yaml", "es.sigma=0.002"])

Without a YAML file the embedded quickstart is the base. Unknown keys, wrong types and impossible
combinations raise `InputError`, a line for each problem: the key's full name, what was given, what is
allowed.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpies.command_line import width
from mpies.config.allowed import allowed
from mpies.config.settings import CHANGEABLE, FIELDS, SECTIONS, Settings
from mpies.config.task_settings import short_name
from mpies.errors import InputError
from mpies.plain_yaml import LONGEST, given, parse
from mpies.text import clip

# Whoever sets one of these means another task than the quickstart's, whose settings would not fit it.
TASKS = ("name", "reward", "expects", "train_data", "environment", "environment_factory", "tools", "agent")
A_TASK_OF_ONES_OWN = tuple(f"task.{key}=" for key in TASKS)


def load(arguments: list[str]) -> Settings:
    """Settings from the command line's arguments: at most one YAML file, then overrides.

    Raises InputError, whose message has one line per problem.
    """
    files = [argument for argument in arguments if not _is_setting(argument)]
    options = [file for file in files if file.startswith("-") or file in FIELDS]
    if options:
        raise InputError("\n".join(_option(option) for option in options))
    if len(files) > 1:
        raise InputError(f"one configuration file at most, but there are {len(files)}: {', '.join(files)}")
    tree = _read(Path(files[0])) if files else quickstart()
    overrides, problems = [argument for argument in arguments if argument not in files], []
    if not files and any(override.startswith(A_TASK_OF_ONES_OWN) for override in overrides):
        del tree["task"]
    for override in overrides:
        problems += _set(tree, *override.split("=", 1))
    return _validate(tree, problems)


def _option(given: str) -> str:
    """What to say of a setting that is written as an option, or without its value."""
    key = given.lstrip("-")
    meant = key if key in FIELDS else _nearest(key)
    remedy = f"settings are written {meant or 'section.key'}=VALUE, without dashes or blanks"
    return f"{given}: {remedy}" + ("" if meant else "; --help lists them")


def _is_setting(argument: str) -> bool:
    """`section.key=value`, whatever the value ends with; else a file, whose name may hold an = as well."""
    key, equals, _ = argument.partition("=")
    named = key.lstrip("-").partition(".")[0] in SECTIONS
    return bool(equals) and (named or not argument.endswith((".yaml", ".yml")))


def from_yaml(text: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings from `Settings.to_yaml`, as the run file keeps them, with overrides `section.key=value`."""
    tree, problems = _sections("the settings in the run file", text), []
    for override in overrides:
        problems += _set(tree, *override.split("=", 1))
    return _validate(tree, problems)


def refuse_changes(before: Settings, now: Settings) -> None:
    """Raise InputError if a run cannot go on with other settings, naming those that differ."""
    old, new = comparable(before), comparable(now)
    differing = [key for key in new if old.get(key) != new[key] and key not in CHANGEABLE]
    if differing:
        lines = [f"{key}: the run was begun with {old.get(key)!r}, not {new[key]!r}" for key in differing]
        remedy = (
            "settings of a run stay: put them back, or begin a new run in another run.directory. On resuming,"
            f" only these may change: {', '.join(CHANGEABLE)}"
        )
        raise InputError("\n".join([*lines, remedy]))


def comparable(settings: Settings) -> dict[str, Any]:
    """Full key -> value; the user's code may lie elsewhere now, since its files' digests are compared."""
    rewards = sorted((short_name(name), weight) for name, weight in settings.task.reward.items())
    task = settings.task
    return settings.flat() | {
        "task.reward": rewards,
        "task.expects": task.expects and short_name(task.expects),
        "task.environment": task.environment and short_name(task.environment),
        "task.environment_factory": {name: short_name(place) for name, place in task.factories.items()},
        "task.tools": [short_name(name) for name in task.tools],
        "task.agent": task.agent and short_name(task.agent),
    }


def _validate(tree: Any, problems: Sequence[str] = ()) -> Settings:
    # An empty section is all defaults.
    tree = {name: {} for name in SECTIONS} | {
        name: {} if section is None and name in SECTIONS else section for name, section in tree.items()
    }
    lines = list(problems)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        lines += [_line(problem) for problem in error.errors()]
    else:
        lines += [*_no_texts(settings)]
    if lines:
        raise InputError("\n".join(lines))
    return settings


def _no_texts(settings: Settings) -> Iterator[str]:
    """What to say of texts that no file, and no run file, can be named by."""
    for key, value in settings.flat().items():
        for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            if "\0" in text or text != text.encode(errors="replace").decode():
                yield f"{key}: given {text!a:.80}, allowed is text in UTF-8 without null characters"


def quickstart() -> dict[str, Any]:
    """The embedded quickstart's settings, before checks."""
    return parse(resources.files("mpies.config").joinpath("quickstart.yaml").read_text())


def describe() -> str:
    """Every setting with meaning, default and what is allowed, for `--help`."""
    columns, lines = width(), []
    for name, section in SECTIONS.items():
        lines.append(f"{name}: {section.__doc__}")
        for key, field in section.model_fields.items():
            default = "required" if field.is_required() else f"default {shown(field.default)}"
            about = f"{name}.{key}: {field.description} ({default}; {allowed(field)})"
            lines += textwrap.wrap(
                about, columns, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
            )
    return "\n".join(lines)


def shown(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if default not in ("", {}) else "empty"


def keys() -> list[str]:
    """The full names of all settings."""
    return list(FIELDS)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: cannot read the configuration file ({reason})") from None
    return _sections(str(path), text)


def _sections(what: str, text: str) -> dict[str, Any]:
    """Sections with settings, before checks. Raises InputError, which says in what text the trouble is."""
    try:
        tree = parse(text)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{what}: expected sections ({', '.join(SECTIONS)}) with settings")
    return tree


def _set(tree: dict[str, Any], key: str, text: str) -> list[str]:
    """Set a key in the tree; returns the problem, if there is one."""
    section, _, name = key.partition(".")
    if key not in FIELDS:
        return [_unknown(key)]
    try:
        # A folder may be called 4711: what is text is taken as it stands.
        value = text if FIELDS[key].annotation is str else parse(text)
    except InputError:
        return [f"{key}: cannot read the value {given(text)}"]
    branch = tree.get(section)
    tree[section] = {**(branch if isinstance(branch, dict) else {}), name: value}
    return []


def _unknown(key: Any) -> str:
    """What to say of a key that is none."""
    if key in SECTIONS:
        first = next(iter(SECTIONS[key].model_fields))
        return (
            f"{key}: a section, no setting; its settings are written {key}.NAME=VALUE, such as {key}.{first}"
        )
    near = _nearest(str(key)[:80])
    hint = f"did you mean {near}?" if near else "--help lists all settings"
    return f"{clip(str(key))}: no such setting; {hint}"


def _nearest(key: Any) -> str | None:
    """The nearest name to a key that is none, in its section or anywhere."""
    section, _, name = str(key).lstrip("-").lower().rpartition(".")
    anywhere = section not in SECTIONS
    known = {k.split(".")[1]: k for k in keys() if anywhere or k.startswith(f"{section}.")}
    if not section:
        known |= {own: own for own in SECTIONS}
    elsewhere = {k.split(".")[1]: k for k in keys()}
    known = known if name not in elsewhere else {name: elsewhere[name], **known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [short for short in known if name and short.startswith(name)]
    return known[near[0]] if near else None


def _line(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(key)
    if problem["type"] == "missing":
        return f"{key}: missing; set it in the configuration file or as {key}=VALUE"
    if problem["type"] == "value_error":  # from the checks above, which name the keys themselves
        return str(problem["ctx"]["error"])
    message = problem["msg"].removeprefix("Input should be ")
    if problem["type"] == "invalid_key":
        return f"{clip(key)}: no such setting; --help lists all settings"
    if problem["type"] == "model_type":
        message = f"a section with settings, such as {key}: {{...}}"
    if problem["type"] == "bool_type":
        message = "true or false"
    return f"{key}: given {given(problem['input'])}, allowed is {message}"
