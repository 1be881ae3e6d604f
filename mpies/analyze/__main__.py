"""The command line: `python -m mpies.analyze COMMAND RUN...`."""

from __future__ import annotations

import sys

from mpies.analyze.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
