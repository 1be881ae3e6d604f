"""The embedded model of the quickstart: its name and where its folder lies.

Nothing heavy is imported here: command lines ask for the folder before they know whether they
need a model.
"""

import os
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"


def model_folder() -> Path:
    """Return the cache folder of the embedded model, whether or not it has been fetched.

    It is `MODEL_NAME` in $MPIES_CACHE, else in mpies/ of $XDG_CACHE_HOME, else in ~/.cache/mpies.
    """
    if own := os.environ.get("MPIES_CACHE"):
        cache = Path(own).expanduser()
    elif shared := os.environ.get("XDG_CACHE_HOME"):
        cache = Path(shared).expanduser() / "mpies"
    else:
        cache = Path.home() / ".cache" / "mpies"
    return cache / MODEL_NAME
