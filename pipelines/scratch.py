"""Temporary folders on this machine's disk, and the room that is left there.

A killed process leaves its folders behind. On each lies a lock of the kernel's, which ends with its process, however
that dies; so whoever makes the next folder can tell which are abandoned, and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import OutageError
from pipelines.formatting import format_bytes

PREFIX = "two-stream-i3d-"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
LARGE_SHARE = 0.5  # of a disk, above which a file is at fault for not fitting, and not the disk for being full
POLL_S = 2.0  # between looks whether others have made room


class NoRoomError(OSError):
    """A file is too large for this machine's disk."""


@contextlib.contextmanager
def folder(purpose: str) -> Iterator[Path]:
    """An empty folder for a while; others' folders whose processes have died are removed first."""
    remove_abandoned()
    path, handle = _make(purpose)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _make(purpose: str) -> tuple[Path, int | None]:
    """A new folder, and what holds its lock; None where the file system has no locks, as some of clusters have none."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        try:
            handle = _lock(path)
        except OSError:  # nor will others get its lock, and take it for abandoned
            return path, None
        if handle is not None and path.exists():
            return path, handle
        if handle is not None:  # another process took it for abandoned before it was locked
            os.close(handle)


def remove_abandoned() -> None:
    """Remove the folders of processes that have died."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # without locks nobody can tell
            if (handle := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another process does, or the folder is another user's.

    Raises OSError where the file system has no locks.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        raise
    return handle


def await_room(path: Path, num_bytes: int) -> None:
    """Wait until the disk of a scratch folder has so many bytes free, for as long as folders of its purpose hold some.

    Where all that these hold would not do, raises NoRoomError for a file that is large for this disk, and OutageError
    where the disk is full of something else.
    """
    while True:
        free = shutil.disk_usage(path).free
        if free + _held_by_others(path) < num_bytes:
            what = f"{format_bytes(num_bytes)} do not fit: {path.parent} has {format_bytes(free)} free"
            if num_bytes > LARGE_SHARE * shutil.disk_usage(path).total:
                raise NoRoomError(errno.ENOSPC, what)
            raise OutageError(f"{what} on {socket.gethostname()}. Make room there, then run the same command again")
        # At random, so that those who wait do not all come at once.
        time.sleep(random.uniform(0.5, 1.5) * POLL_S)
        if shutil.disk_usage(path).free >= num_bytes:
            return


def _held_by_others(path: Path) -> int:
    """Bytes in the folders of the same purpose; their processes give them back when they are done with a file."""
    purpose = path.name.rpartition("-")[0]
    held = 0
    for other in path.parent.glob(f"{purpose}-*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            held += 0 if other == path else sum(file.stat().st_size for file in other.iterdir())
    return held
