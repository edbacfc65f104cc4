"""One run at a time on one output.

On disk the kernel holds the lock (flock), so it is gone the moment its process dies, however it dies. S3 has no such
thing: there the lock is an object created with If-None-Match, renewed by a heartbeat, and void when the heart stops.
The machine that it was taken on sees at once whether its process still lives; any other waits. On a store without
compare-and-swap two runs could take a void lock over at once, so it is never taken over there, but by hand.

Tasks outlive their run: those of a driver that sleeps, or of one that was killed and whose nodes have not heard of it.
Each holds a claim, by which it looks whose the lock is before it writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines import storage
from pipelines.errors import OutputError, OutputLockedError

HEARTBEAT_S = 10.0
INTERRUPT_AGAIN_S = 10.0
STALE_AFTER_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """By what a task of a run, on any node, tells whether the output is still that run's."""

    output: str
    token: str

    def is_lost(self) -> bool:
        """Whether another run has the output by now, or none; not where nothing answers."""
        try:
            return not self.is_held()
        except OSError:
            return False

    def is_held(self) -> bool:
        """Whether the lock is still this run's. Raises OSError where nothing answers."""
        try:
            return _token_in(storage.read_bytes(_lock_uri(self.output))) == self.token
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """OutputLockedError where another run has the output by now, or none."""
        if not self.is_held():
            raise OutputLockedError(
                f"{self.output} was taken over by another run, or given up, while a task of this one still worked"
            )


class OutputLock:
    """What a run holds while it writes; `is_held` asks whether it still does, where that can change."""

    def __init__(self, output: str, token: str, is_held: Callable[[], bool] | None = None) -> None:
        self.output, self.is_held = output, is_held
        self.claim = Claim(output=output, token=token)
        self.lost = False
        self.renewed = time.time()  # not the monotonic clock, which a suspended machine stops

    def check(self) -> None:
        """OutputLockedError where another run took the output over, because this one was not heard of for too long."""
        if time.time() - self.renewed > 2 * HEARTBEAT_S:  # as after a sleep, from which the heart is not yet up
            self.look()
        if self.lost:
            raise OutputLockedError(
                f"{self.output} was taken over by another run: this one could not renew its lock for "
                f"{STALE_AFTER_S:.0f} s (a suspended machine or a broken network). Let the other finish"
            )

    def look(self) -> None:
        """Find out whether the lock is still this run's; where nothing answers, nothing is found out."""
        if self.is_held is not None:
            with contextlib.suppress(OSError):
                self.lost = self.lost or not self.is_held()

    @contextlib.contextmanager
    def stop_run_when_lost(self) -> Iterator[None]:
        """For a run that waits for others' work in the main thread: interrupt it as Ctrl-C does once the lock is lost.

        However the run ends then, OutputLockedError is what comes of it.
        """
        over = threading.Event()
        if self.is_held is not None:
            threading.Thread(target=self._interrupt_when_lost, args=(over,), daemon=True).start()
        try:
            yield
            self.check()
        except BaseException:
            over.set()  # first: another interrupt would hide what comes of it
            self.check()
            raise
        finally:
            over.set()

    def _interrupt_when_lost(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_S):
            try:
                self.check()
            except OutputLockedError:
                break
        # Until it has worked: one that comes just before the main thread begins to wait does not wake it.
        while not over.is_set():
            # Not _thread.interrupt_main, which does not wake what waits.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            over.wait(INTERRUPT_AGAIN_S)


@contextlib.contextmanager
def lock_output(output: str) -> Iterator[OutputLock]:
    """Hold the output for one run; OutputLockedError, which names the holder, where another run does.

    Raises OutputError where nobody could write there.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(_hold_object(output) if storage.is_remote(output) else _hold_file(output))
        except OSError as error:
            raise OutputError(
                f"cannot write to {output}: {error}. Check the path, and for S3 the bucket and the credentials"
            ) from error
        yield lock


def _lock_uri(output: str) -> str:
    return storage.join(output, "lock.json" if storage.is_remote(output) else ".lock")


def _describe() -> dict[str, object]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _identify_machine(),
        "began": _find_began(pid),
        "token": uuid.uuid4().hex,
        "beat": time.time(),
    }


def _identify_machine() -> str | None:
    """What two processes share only if they see each other's pids: the boot and the pid namespace; None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux, or /proc is hidden
        return None


def _find_began(pid: int) -> int | None:
    """When a living process of this machine began, in ticks since the boot: a pid is used again. None: it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _has_died(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and is seen to be dead."""
    here = _identify_machine()
    if here is None or holder.get("machine") != here:
        return False
    began = _find_began(holder["pid"])
    if began is None:
        try:
            os.kill(holder["pid"], 0)
        except PermissionError:  # another user's, and alive: /proc may hide it (hidepid)
            return False
        except ProcessLookupError:
            return True
    return began != holder["began"]


def _refuse(output: str, holder: dict[str, object], remedy: str) -> OutputLockedError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return OutputLockedError(f"{output} is being written by another run ({who}). {remedy}")


@contextlib.contextmanager
def _hold_file(output: str) -> Iterator[OutputLock]:
    path = Path(_lock_uri(output))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refuse(output, _read_holder(file), "Wait for it or stop it, or choose another --output.") from None
        file.truncate(0)
        mine = _describe()
        file.write(json.dumps(mine))
        file.flush()
        yield OutputLock(output, str(mine["token"]))
        file.truncate(0)  # what a finished run leaves does not depend on when it ran


def _read_holder(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except ValueError:  # it is being written this moment
        return {}


@contextlib.contextmanager
def _hold_object(output: str) -> Iterator[OutputLock]:
    uri = _lock_uri(output)
    record = _take_object(output, uri)
    token = str(record["token"])
    lock, stop = OutputLock(output, token, Claim(output=output, token=token).is_held), threading.Event()
    heart = threading.Thread(target=_beat, args=(uri, record, lock, stop), daemon=True)
    heart.start()
    try:
        yield lock
    finally:
        stop.set()
        heart.join()
        lock.look()  # the heart may not have beaten since another run took it
        with contextlib.suppress(OSError):  # what cannot be deleted now is void soon
            if not lock.lost:
                storage.delete(uri)


def _token_in(record_bytes: bytes) -> str | None:
    """What tells the run of a record from others; None where the bytes are no such record."""
    try:
        record = json.loads(record_bytes)
    except ValueError:
        return None
    whole = isinstance(record, dict) and {"host", "pid", "token", "beat"} <= record.keys()
    return str(record["token"]) if whole else None


def _take_object(output: str, uri: str) -> dict[str, object]:
    mine = _describe()
    while not storage.create(uri, _encode(mine)):
        try:
            record_bytes = storage.read_bytes(uri)
        except FileNotFoundError:  # released this moment
            continue
        if _token_in(record_bytes) is None:
            remedy = f"{uri} does not say which. Make sure that none runs, delete it, and run this command again."
            raise _refuse(output, {}, remedy)
        holder = json.loads(record_bytes)
        if holder == mine:  # the answer to the creation was lost, and its repetition refused
            break
        if not _has_died(holder):
            silent = time.time() - holder["beat"]
            if silent < STALE_AFTER_S:
                wait = f"its lock is void in {STALE_AFTER_S - silent:.0f} s: run this command again then."
                raise _refuse(output, holder, f"If it was killed, {wait}")
            if storage.can_exchange(uri):
                time.sleep(2 * HEARTBEAT_S)  # clocks differ: a holder that lives shows it by a beat
        if not storage.can_exchange(uri):
            raise _refuse(
                output, holder, f"That run seems dead. Make sure of it, delete {uri}, and run this command again."
            )
        mine["beat"] = time.time()
        if not storage.exchange(uri, record_bytes, _encode(mine)):
            raise _refuse(output, holder, "Wait for it or stop it, or choose another --output.")
        return mine
    if storage.create(uri, _encode({**mine, "beat": time.time()})):
        logger.warning(
            "the S3 server of %s takes no heed of If-None-Match: it would let two runs start on one output at the same "
            "moment. See to it that only one runs",
            output,
        )
    return mine


def _encode(record: dict[str, object]) -> bytes:
    return json.dumps(record).encode()


def _beat(uri: str, record: dict[str, object], lock: OutputLock, stop: threading.Event) -> None:
    while not lock.lost and not stop.wait(HEARTBEAT_S):
        try:
            record_bytes = storage.read_bytes(uri)
            lock.lost = _token_in(record_bytes) != record["token"]
            now = time.time()
            if not lock.lost and _renew(uri, record_bytes, _encode({**record, "beat": now})):
                lock.renewed = now
        except FileNotFoundError:
            lock.lost = True
        except OSError as error:
            logger.warning("the lock could not be renewed; next try in %g s: %s", HEARTBEAT_S, error)


def _renew(uri: str, old: bytes, new: bytes) -> bool:
    if storage.can_exchange(uri):
        return storage.exchange(uri, old, new)
    storage.put(uri, new)  # nobody takes it over by itself
    return True
