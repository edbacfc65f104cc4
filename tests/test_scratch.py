"""Room on this machine's disk: leftovers of killed processes, downloads that do not fit, and those that wait."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import scratch, storage
from pipelines.datasets.catalog import read_catalog
from pipelines.errors import OutageError
from pipelines.extraction.graph import Steps
from pipelines.extraction.plan import ExtractionSettings, make_plan

MB = 1 << 20
HOLD = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from pipelines import scratch
with scratch.folder("video") as folder:
    (folder / "large.mp4").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> str:
    """An empty bucket of S3, and one of a stand-in for Google's store."""
    return str(request.getfixturevalue(request.param))


def limit_disk(monkeypatch: pytest.MonkeyPatch, here: Path, size: int) -> None:
    """A disk of so many bytes, of which what lies in the scratch folders is used."""

    def usage(path: object) -> SimpleNamespace:
        used = sum(file.stat().st_size for file in here.rglob("*") if file.is_file())
        return SimpleNamespace(total=size, used=used, free=size - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_file_system_without_locks_has_folders_that_nobody_removes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre is often mounted on clusters."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    made: list[str] = []
    make = tempfile.mkdtemp

    def count(**named: str) -> str:
        assert len(made) < 2, "it makes one folder after another"
        made.append(make(**named))
        return made[-1]

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", count)
    with scratch.folder("video") as first, scratch.folder("video") as second:
        assert {str(first), str(second)} == set(made)
        assert sorted(here.iterdir()) == sorted([first, second])
    assert not list(here.iterdir())


def test_the_folder_of_a_killed_process_goes_and_that_of_a_living_one_stays(here: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(here)]
    holders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = [Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout]
    try:
        holders[0].kill()
        holders[0].wait()
        assert killed.exists()
        with scratch.folder("video") as mine:
            assert set(here.iterdir()) == {living, mine}
            assert (living / "large.mp4").exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def test_a_video_that_no_disk_here_could_hold_costs_that_video_only(
    store: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{store}/videos/large.mp4", bytes(3 * MB))
    limit_disk(monkeypatch, here, 2 * MB)
    catalog = read_catalog(f"{store}/videos")
    plan = make_plan(catalog, ExtractionSettings(), videos=f"{store}/videos", output=str(here), kernel="cpu")
    done = Steps.of(plan, backend="cpu").extract(plan.table.to_pylist()[0])
    assert (done["status"], done["stage"], done["error_kind"]) == ("quarantined", "decode", "no_room")
    assert "3.15 MB do not fit" in done["error_message"]
    assert list(here.iterdir()) == []


def test_a_disk_that_is_full_of_other_things_costs_no_video(
    store: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{store}/videos/small.mp4", bytes(3 * MB))
    (here / "other").write_bytes(bytes(6 * MB))
    limit_disk(monkeypatch, here, 8 * MB)
    sentence = r"3\.15 MB do not fit: .* has 2\.1 MB free on .*Make room there"
    with pytest.raises(OutageError, match=sentence), storage.local_copy(f"{store}/videos/small.mp4"):
        pass


def test_a_download_waits_for_room_that_another_will_give_back(
    store: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{store}/large.mp4", bytes(3 * MB))
    limit_disk(monkeypatch, here, 4 * MB)
    monkeypatch.setattr(scratch, "POLL_S", 0.05)
    with scratch.folder("video") as others:
        (others / "other.mp4").write_bytes(bytes(2 * MB))
        threading.Timer(0.5, (others / "other.mp4").unlink).start()
        with storage.local_copy(f"{store}/large.mp4") as path:
            assert Path(path).stat().st_size == 3 * MB
            assert not (others / "other.mp4").exists()


def test_a_quota_is_a_full_disk_of_this_machine_and_not_the_servers_fault(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{store}/video.mp4", b"x")

    def refuse(room: object, size: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(storage._Room, "set_size", refuse)
    with pytest.raises(OSError, match="quota") as caught, storage.local_copy(f"{store}/video.mp4"):
        pass
    assert caught.value.errno == errno.EDQUOT
