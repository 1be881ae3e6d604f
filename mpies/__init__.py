"""mpies: fine-tune all parameters of a language model with evolution strategies, under MPI.

`mpirun -n 2 python -m mpies.train` is the whole interface to begin with.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What sources call themselves that nobody installed; the same as fallback_version in pyproject.toml.
FALLBACK_VERSION = "0.2.0.dev0"


def _version() -> str:
    """The version of the installation that this package is part of, else FALLBACK_VERSION.

    Sources on PYTHONPATH may stand before another mpies that is installed: its version is not theirs, and
    would be written into their run files.
    """
    home = Path(__file__).resolve().parents[1]
    for installed in metadata.distributions(name="mpies"):
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            root = unquote(urlsplit(origin["url"]).path)
        else:
            root = str(installed.locate_file(""))
        if Path(root).resolve() == home:
            return installed.version
    return FALLBACK_VERSION


__version__ = _version()
