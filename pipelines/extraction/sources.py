"""A video file on its way into a task: fetched, known to be the one that was decoded, and what is wrong with it.

What one file does costs that file, which becomes a row of the quarantine table; a storage that is down, or a machine
that has run out of something, ends the run.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2

from pipelines import storage
from pipelines.datasets.shards import Row
from pipelines.errors import BackendError, NetworkError, OutageError, RunError, VideoError
from pipelines.scratch import FULL_DISK, NoRoomError

USED_UP = (*FULL_DISK, errno.EMFILE, errno.ENFILE)  # what a machine has run out of is no fault of a video

logger = logging.getLogger(__name__)


@contextmanager
def fetch(row: Row) -> Iterator[str]:
    """A local path of the video. What is wrong with one file costs that file; a storage that is down ends the run."""
    uri = row["path"]
    try:
        with ExitStack() as stack:
            try:
                path = stack.enter_context(storage.local_copy(uri))
            except (FileNotFoundError, PermissionError) as error:
                raise VideoError("unreadable", f"the file could not be fetched: {error}") from error
            except NoRoomError as error:
                raise VideoError("no_room", f"the file could not be fetched: {error.strerror}") from error
            except OutageError:
                raise
            except OSError as error:
                raise OutageError(f"{uri} could not be fetched: {error}") from error
            yield path
    except (VideoError, OSError):
        storage.check_answers(uri.removesuffix(f"/{row['source']}"))  # without it any video looks broken
        raise


def attempt(row: Row, step: Callable[[Row], Row], *, stage: str) -> Row:
    """The row with what the step adds, or quarantined with stage, kind and message.

    `stage`: of failures that are not the file's; those say themselves where they came up.
    """
    cv2.setNumThreads(1)  # a task reserves one CPU; OpenCV would take them all
    try:
        return {**row, **step(row)}
    except (OutageError, BackendError, NetworkError, RunError):
        raise
    except VideoError as error:
        stage, kind, message = error.stage, str(error.kind), error.message
    # The one broad except of the graph: whatever else a video does to a library costs that video, not the run.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USED_UP:
            raise OutageError(f"{socket.gethostname()}: {error}. Make room there, then run again") from error
        logger.exception("video %s failed", row["id"])
        kind, message = type(error).__name__, str(error)
    message = message.encode(errors="replace").decode()  # file names may hold what no table can
    return {**row, "status": "quarantined", "stage": stage, "error_kind": kind, "error_message": message, "rgb": None}


class HashedFile:
    """A file that is about to be decoded, and whose hash is wanted of the very bytes that were."""

    def __init__(self, path: str) -> None:
        self.path, self.stamp = path, _stamp(path)

    def sha256(self) -> str:
        """Of the file that was decoded. Raises VideoError where another one is there since."""
        try:
            sha256 = storage.hash_file(self.path)
            changed = _stamp(self.path) != self.stamp
        except FileNotFoundError:
            changed = True
        if changed:
            raise VideoError("changed", "the file was replaced, or written to, while it was decoded")
        return sha256


def _stamp(path: str) -> tuple[int, ...] | None:
    """What changes with a file's content; None where there is no file."""
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
