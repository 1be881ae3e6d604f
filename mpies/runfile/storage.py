"""The run file on its disk: written so that it is there or not, locked against other jobs."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import h5py

from mpies.errors import InputError, reason
from mpies.files import written_whole

LOCK = "run.lock"  # its name beside the run file
PATIENCE = 10.0  # seconds that a job that was just killed may hold it


def commit(file: h5py.File) -> None:
    """To the disk, past the node's memory."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())


def replace_file(path: Path, image: io.BytesIO) -> None:
    """Write the file as a whole, its name to the disk as well."""
    with written_whole(path) as file:
        file.write(image.getbuffer())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """With the folder, made if it is not there; what was made goes again if that within fails."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):  # another job's files are in it
                made.rmdir()
        raise


@contextlib.contextmanager
def lock_given_back(path: Path, lock: int) -> Iterator[None]:
    """No trace of the lock stays if that within fails; only for who has found no run file."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.with_name(LOCK).unlink()
        os.close(lock)
        raise


def lock_folder(path: Path) -> int:
    """Take the run directory for this job until it ends: a descriptor that holds the lock.

    A job that was just killed may hold it for some seconds more.
    """
    descriptor = _lock(path)
    while not _is_there(descriptor, path.with_name(LOCK)):  # taken away by a job that could not begin
        os.close(descriptor)
        descriptor = _lock(path)
    return descriptor


def _is_there(descriptor: int, path: Path) -> bool:
    """Is the open file still the one of this name?"""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(path: Path) -> int:
    try:
        descriptor = os.open(path.with_name(LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"run.directory: cannot write to {path.parent} ({reason(error)})") from None
    try:
        import fcntl
    except ImportError:  # a system without such locks, on which runs are read and replayed
        return descriptor
    start = time.monotonic()
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except (BlockingIOError, PermissionError):
            if time.monotonic() - start > PATIENCE:
                os.close(descriptor)
                raise InputError(f"run.directory: {path.parent} is in use by another job") from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return descriptor
