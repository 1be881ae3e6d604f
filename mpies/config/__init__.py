"""The settings of a run: `settings` says what there is, `reading` makes them of files and command lines."""

from mpies.config.reading import (
    describe,
    from_yaml,
    keys,
    load,
    quickstart,
    refuse_changes,
)
from mpies.config.settings import (
    CHANGEABLE,
    EngineSettings,
    EsSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TaskSettings,
)

__all__ = [
    "CHANGEABLE",
    "EngineSettings",
    "EsSettings",
    "ModelSettings",
    "RunSettings",
    "Settings",
    "TaskSettings",
    "describe",
    "from_yaml",
    "keys",
    "load",
    "quickstart",
    "refuse_changes",
]
