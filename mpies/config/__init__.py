"""The settings of a run: `settings` says what there is, `reading` makes them of files and command lines."""

from mpies.config.paths import make_absolute, relative_paths
from mpies.config.reading import (
    comparable,
    describe,
    from_yaml,
    keys,
    load,
    quickstart,
    refuse_changes,
)
from mpies.config.remarks import remark
from mpies.config.section import Role
from mpies.config.settings import (
    CHANGEABLE,
    MOST_THREADS,
    EngineSettings,
    EsSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TaskSettings,
    role_of,
)
from mpies.config.task_settings import short_name

__all__ = [
    "CHANGEABLE",
    "MOST_THREADS",
    "EngineSettings",
    "EsSettings",
    "ModelSettings",
    "Role",
    "RunSettings",
    "Settings",
    "TaskSettings",
    "comparable",
    "describe",
    "from_yaml",
    "keys",
    "load",
    "make_absolute",
    "quickstart",
    "refuse_changes",
    "relative_paths",
    "remark",
    "role_of",
    "short_name",
]
