"""Files that appear whole or not at all, and those that could not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mpies.errors import InputError, StorageError, reason


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Write the file under another name, to the disk; then it takes the place of one that is there.

    If anything is raised, OSError included, what is there stays, and nothing is left beside it. A device or
    a pipe (/dev/stdout, and /dev/null for root) is written to, not replaced by a file.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_report(option: str, path: Path, content: bytes) -> None:
    """Write the file that an option names. It appears whole or not at all; raises StorageError."""
    try:
        with written_whole(path) as file:
            file.write(content)
    except OSError as error:
        raise StorageError(f"{option}: cannot write {path} ({reason(error)})") from None


def refuse_unwritable(option: str, name: str | None) -> None:
    """Raise InputError now if a file that an option names could not be written at the end."""
    if name:
        path = Path(name).absolute()
        special = path.exists() and not path.is_file()  # a device or a pipe is written to as it is
        if (
            path.is_dir()
            or not path.parent.is_dir()
            or not os.access(path if special else path.parent, os.W_OK)
        ):
            raise InputError(f"{option}: cannot write {name}; name a file in a folder that is there")
