"""One run at a time on one output.

On disk the kernel holds the lock (flock), so it is gone the moment its process dies, however it dies. S3 has no such
thing: there the lock is an object created with If-None-Match, renewed by a heartbeat, and void when the heart stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines import storage

HEARTBEAT_S = 10.0
STALE_AFTER_S = 60.0


class OutputLockedError(ValueError):
    """Another run works on this output."""


@contextlib.contextmanager
def lock_output(output: str) -> Iterator[None]:
    """Hold the output for one run; OutputLockedError, which names the holder, where another run does."""
    with _hold_object(storage.join(output, "lock.json")) if storage.is_remote(output) else _hold_file(output):
        yield


def _describe() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "beat": time.time()}


def _refuse(output: str, holder: dict[str, object], remedy: str) -> OutputLockedError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return OutputLockedError(f"{output} is being written by another run ({who}). {remedy}")


@contextlib.contextmanager
def _hold_file(output: str) -> Iterator[None]:
    path = Path(output) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refuse(output, _read_holder(file), "Wait for it or stop it, or choose another --output.") from None
        file.truncate(0)
        file.write(json.dumps(_describe()))
        file.flush()
        yield


def _read_holder(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except ValueError:  # it is being written this moment
        return {}


@contextlib.contextmanager
def _hold_object(uri: str) -> Iterator[None]:
    mine = _describe()
    if not storage.create(uri, json.dumps(mine).encode()):
        holder = json.loads(storage.read_bytes(uri))
        silent = time.time() - float(holder["beat"])
        if silent < STALE_AFTER_S:
            remedy = (
                f"If it was killed, its lock is void in {STALE_AFTER_S - silent:.0f} s: run this command again then."
            )
            raise _refuse(uri.removesuffix("/lock.json"), holder, remedy)
        storage.put(uri, json.dumps(mine).encode())
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(uri, mine, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        storage.delete(uri)


def _beat(uri: str, mine: dict[str, object], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a lost beat is made up for by the next one
            storage.put(uri, json.dumps({**mine, "beat": time.time()}).encode())
