"""Two runs on one output: processes on disk, heartbeats on S3."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures_jobs import run_here

from pipelines import lock, storage
from pipelines.errors import OutputError, OutputLockedError
from pipelines.lock import OutputLock, lock_output

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import subprocess, sys, time
from pipelines.lock import lock_output
with lock_output(sys.argv[1]):
    subprocess.Popen(["sleep", "60"])  # Ray's processes outlive a killed driver for a while as well
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_run(output: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the output, and has a child of its own."""
    command = [sys.executable, "-c", HOLDER, output]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(true: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_second_process_is_refused_and_told_who_holds(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with another_run(output) as process, pytest.raises(OutputLockedError) as refusal, lock_output(output):
        pass
    assert f"{output} is being written by another run (process {process.pid} on " in str(refusal.value)
    assert "choose another --output" in str(refusal.value)


def test_a_lock_on_disk_dies_with_its_process(tmp_path: Path) -> None:
    with another_run(str(tmp_path)) as process:
        process.kill()
        process.wait()
        with lock_output(str(tmp_path)) as held:
            held.check()


def test_a_lock_on_disk_is_free_after_use_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock_output(str(tmp_path)):
        raise RuntimeError
    with lock_output(str(tmp_path)), pytest.raises(OutputLockedError), lock_output(str(tmp_path)):
        pass
    with lock_output(str(tmp_path)):
        pass
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(".lock", b"")]


def test_an_output_that_cannot_be_one_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot write to .*File exists.*Check the path"):
        lock_output(str(tmp_path / "file")).__enter__()


def test_an_error_of_the_run_itself_passes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), lock_output(str(tmp_path)):
        raise FileNotFoundError


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heart that beats 20 times a second, and interrupts that are soon repeated."""
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "INTERRUPT_AGAIN_S", 0.5)


def read_lock(output: str) -> dict[str, object]:
    return dict(json.loads(storage.read_bytes(f"{output}/lock.json")))


def leave_lock(output: str, *, age_s: float) -> None:
    """A lock as a killed run leaves it."""
    record = {"host": "elsewhere", "pid": 4711, "token": "theirs", "beat": time.time() - age_s}
    storage.put(f"{output}/lock.json", json.dumps(record).encode())


def test_a_second_run_on_s3_is_refused_and_told_what_to_do(s3: str) -> None:
    leave_lock(s3, age_s=20)
    with pytest.raises(OutputLockedError) as refusal, lock_output(s3):
        pass
    assert f"{s3} is being written by another run (process 4711 on elsewhere)" in str(refusal.value)
    assert re.search(r"If it was killed, its lock is void in \d+ s: run this command again then", str(refusal.value))
    assert read_lock(s3)["token"] == "theirs"


def test_a_lock_on_s3_is_held_renewed_and_released(s3: str, fast: None) -> None:
    with lock_output(s3) as held:
        first = read_lock(s3)
        with pytest.raises(OutputLockedError), lock_output(s3):
            pass
        wait_until(lambda: read_lock(s3)["beat"] != first["beat"])
        assert read_lock(s3)["token"] == first["token"]
        held.check()
    assert not storage.exists(f"{s3}/lock.json")


def test_a_silent_lock_is_taken_over(s3: str, fast: None) -> None:
    leave_lock(s3, age_s=61)
    with lock_output(s3):
        assert read_lock(s3)["pid"] == os.getpid()
    assert not storage.exists(f"{s3}/lock.json")


def test_a_heart_that_beats_on_a_slow_clock_is_alive(s3: str, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lock(s3, age_s=3600)
    monkeypatch.setattr(time, "sleep", lambda seconds: leave_lock(s3, age_s=3599))
    with pytest.raises(OutputLockedError, match="elsewhere"), lock_output(s3):
        pass
    assert read_lock(s3)["token"] == "theirs"


def test_a_lost_lock_is_noticed_and_left_to_the_other(s3: str, fast: None) -> None:
    with lock_output(s3) as held:
        leave_lock(s3, age_s=0)
        wait_until(lambda: held.lost)
        with pytest.raises(OutputLockedError, match="taken over by another run"):
            held.check()
    assert read_lock(s3)["token"] == "theirs"


def test_tasks_of_a_run_that_has_lost_its_lock_may_not_write(s3: str, fast: None, tmp_path: Path) -> None:
    for output in (s3, str(tmp_path)):
        with lock_output(output) as first:
            first.claim.check()
        with pytest.raises(OutputLockedError, match="taken over by another run, or given up"):
            first.claim.check()
        with lock_output(output) as second:
            second.claim.check()
            assert pickle.loads(pickle.dumps(second.claim)) == second.claim != first.claim
            with pytest.raises(OutputLockedError):
                first.claim.check()
            if output == s3:
                leave_lock(s3, age_s=0)
                with pytest.raises(OutputLockedError):
                    second.claim.check()


def test_a_run_that_waits_is_stopped_when_its_lock_is_lost(s3: str, fast: None) -> None:
    def run() -> None:
        with lock_output(s3) as held, held.stop_run_when_lost():
            leave_lock(s3, age_s=0)
            threading.Event().wait(60)  # as in Ray, for a training

    with pytest.raises(OutputLockedError, match="taken over by another run"):
        run()
    with pytest.raises(KeyboardInterrupt), lock_output(f"{s3}/other") as held, held.stop_run_when_lost():
        raise KeyboardInterrupt


def test_an_interrupt_that_does_not_wake_the_run_is_sent_again(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    held = OutputLock("s3://data/out", "token", lambda: False)
    held.lost = True

    def kill(thread: int, number: int) -> None:
        sent.append(thread)
        if len(sent) > 1:  # the first is lost: it came just before the thread began to wait
            os.kill(os.getpid(), number)

    monkeypatch.setattr(lock, "INTERRUPT_AGAIN_S", 0.05)
    monkeypatch.setattr(lock.signal, "pthread_kill", kill)
    with pytest.raises(OutputLockedError), held.stop_run_when_lost():
        threading.Event().wait(20)
    assert len(sent) == 2


@pytest.mark.parametrize("name", ["extract_flow", "extract_features"])
def test_a_job_that_waits_for_its_cluster_is_stopped_when_its_lock_is_lost(
    name: str, s3: str, fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two shards it would never look: those of a driver that slept may never come."""
    job = importlib.import_module(f"jobs.{name}")

    def wait(*_: object, **__: object) -> None:
        leave_lock(s3, age_s=0)
        threading.Event().wait(60)

    monkeypatch.setattr(job, "look_up", wait)
    networks = []
    if name == "extract_features":
        networks = ["--rgb", "unread"]
        monkeypatch.setattr(job.Source, "open", lambda config: SimpleNamespace(output=s3, make_plan=None))
    (tmp_path / "a.mp4").touch()
    done = run_here(name, "--videos", tmp_path, *networks, "--output", s3)
    assert (done.returncode, done.stderr.startswith(f"error: {s3} was taken over by another run")) == (1, True)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"token": "x"}', b"\xff"])
def test_a_lock_that_is_no_record_is_refused_with_what_to_do(s3: str, content: bytes) -> None:
    storage.put(f"{s3}/lock.json", content)
    with pytest.raises(OutputLockedError, match=r"lock\.json does not say which.* delete it"), lock_output(s3):
        pass


def test_a_lock_that_was_written_over_is_lost(s3: str, fast: None) -> None:
    with lock_output(s3) as held:
        storage.put(f"{s3}/lock.json", b"no record")
        wait_until(lambda: held.lost)


def test_a_deleted_lock_is_lost(s3: str, fast: None) -> None:
    with lock_output(s3) as held:
        storage.delete(f"{s3}/lock.json")
        wait_until(lambda: held.lost)


def test_a_beat_that_fails_is_made_up_for(
    s3: str, s3_faults: list[str], fast: None, caplog: pytest.LogCaptureFixture
) -> None:
    with lock_output(s3) as held:
        s3_faults.append("403 RequestTimeTooSkewed")
        wait_until(lambda: "could not be renewed" in caplog.text)
        beat = read_lock(s3)["beat"]
        wait_until(lambda: read_lock(s3)["beat"] != beat)
        held.check()


def test_a_creation_whose_answer_was_lost_counts(s3: str, s3_faults: list[str]) -> None:
    s3_faults.append("done 500 InternalError")
    with lock_output(s3):
        assert s3_faults == []
        assert read_lock(s3)["pid"] == os.getpid()


def test_a_missing_bucket_is_one_clear_error(s3: str) -> None:
    with pytest.raises(OutputError, match=r"cannot write to s3://no-such-bucket/out: .*bucket does not exist"):
        lock_output("s3://no-such-bucket/out").__enter__()


def test_a_lock_on_s3_whose_process_died_on_this_machine_is_free(s3: str) -> None:
    with another_run(s3) as process:
        process.kill()  # a zombie, until somebody waits for it
        with lock_output(s3):
            assert read_lock(s3)["pid"] == os.getpid()


def test_a_pid_that_another_process_has_now_does_not_hold_a_lock_on_s3(s3: str) -> None:
    with another_run(s3):
        left = read_lock(s3)
    storage.put(f"{s3}/lock.json", json.dumps({**left, "pid": os.getpid()}).encode())
    with lock_output(s3):
        assert read_lock(s3)["token"] != left["token"]


@pytest.mark.parametrize("machine", ["another", None])
def test_a_pid_says_nothing_about_a_process_of_another_machine(s3: str, machine: str | None) -> None:
    with another_run(s3):
        left = read_lock(s3)
    storage.put(f"{s3}/lock.json", json.dumps({**left, "machine": machine}).encode())
    with pytest.raises(OutputLockedError, match="is void in"), lock_output(s3):
        pass


def test_a_run_that_slept_past_its_lease_leaves_the_lock_to_the_other(s3: str) -> None:
    """Its heart has not beaten since."""
    with lock_output(s3) as held:
        leave_lock(s3, age_s=0)
        held.check()  # a lease that was renewed a moment ago cannot have been taken
        held.renewed -= 90
        with pytest.raises(OutputLockedError, match="taken over by another run"):
            held.check()
    assert read_lock(s3)["token"] == "theirs"
    storage.delete(f"{s3}/lock.json")
    with lock_output(s3):
        leave_lock(s3, age_s=0)
    assert read_lock(s3)["token"] == "theirs"


def test_a_process_that_proc_hides_is_alive(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, where /proc is mounted with hidepid."""
    with another_run(s3):
        left = read_lock(s3)
        find = lock._find_began
        monkeypatch.setattr(lock, "_find_began", lambda pid: None if pid == left["pid"] else find(pid))

        def refuse(pid: int, number: int) -> None:
            raise PermissionError

        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", refuse)
            with pytest.raises(OutputLockedError, match="another run"):
                lock_output(s3).__enter__()


def test_a_server_that_ignores_conditions_is_named(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with lock_output(s3):
        assert caplog.text == ""

    def create(uri: str, data: bytes) -> bool:
        storage.put(uri, data)
        return True

    monkeypatch.setattr(storage, "create", create)
    with lock_output(s3) as held:
        held.check()
    assert "takes no heed of If-None-Match" in caplog.text
    assert not storage.exists(f"{s3}/lock.json")


def test_a_store_without_compare_and_swap_is_locked_and_renewed_but_never_taken_over(
    gs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with lock_output(gs) as held:
        before = json.loads(storage.read_bytes(f"{gs}/lock.json"))
        with pytest.raises(OutputLockedError, match="being written by another run"), lock_output(gs):
            pass
        wait_until(lambda: json.loads(storage.read_bytes(f"{gs}/lock.json"))["beat"] > before["beat"])
        held.check()
    assert not storage.exists(f"{gs}/lock.json")
    storage.put(f"{gs}/lock.json", json.dumps({**before, "machine": "another", "beat": 0}).encode())
    with (
        pytest.raises(OutputLockedError, match=rf"seems dead. Make sure of it, delete {gs}/lock.json"),
        lock_output(gs),
    ):
        pass
