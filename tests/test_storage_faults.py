"""What networks and busy servers do to S3, by a proxy before a real server: success in the end, or one clear error."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
import s3fs.core
from extracted import extract_here, plan_here
from faulty_s3 import FaultyProxy

from pipelines import storage
from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.datasets.shards import ShardSettings
from pipelines.errors import OutageError
from pipelines.extraction.plan import ExtractionSettings
from pipelines.media.decode import DecodeSettings

PASSING = ["busy", "broken", "cut request", "cut answer", "lost answer", "busy answer", "slow"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses: what is tested is that there are some."""
    monkeypatch.setattr(storage, "_pauses", lambda: iter([0.01] * 1000))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own pauses are seconds
    s3fs_asyncio = {**vars(asyncio), "sleep": lambda _: asyncio.sleep(0.01)}  # and those of s3fs tenths of one
    monkeypatch.setattr(s3fs.core, "asyncio", SimpleNamespace(**s3fs_asyncio))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What goes up in two parts."""
    monkeypatch.setattr(storage, "PART_BYTES", 5 * MIB)  # S3 takes no smaller ones
    return os.urandom(10 * MIB)


def fetch(uri: str) -> bytes:
    with storage.local_copy(uri) as path:
        return Path(path).read_bytes()


def read_end(uri: str) -> bytes:
    with storage.open_read(uri) as file:
        file.seek(-1000, os.SEEK_END)
        return file.read()


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_leaves_the_bytes_whole(weed: str, weed_proxy: FaultyProxy, fault: str) -> None:
    data = os.urandom(300_000)
    for action in (storage.put, storage.create):
        weed_proxy.faults += [fault, fault]
        action(f"{weed}/{action.__name__}", data)
        for read in (storage.read_bytes, fetch):
            weed_proxy.faults += [fault, fault]
            assert read(f"{weed}/{action.__name__}") == data
    weed_proxy.faults += [fault, fault]
    assert read_end(f"{weed}/put") == data[-1000:]
    weed_proxy.faults += [fault, fault]
    assert {file.path: file.size for file in storage.list_files(weed)} == {"create": 300_000, "put": 300_000}
    assert weed_proxy.done[fault] >= 8


@pytest.mark.parametrize("fault", PASSING)
def test_a_multipart_upload_survives_a_fault_at_any_of_its_requests(
    weed: str, weed_proxy: FaultyProxy, large: bytes, fault: str
) -> None:
    for place in range(4):  # begin, two parts, complete
        weed_proxy.faults += ["passed"] * place + [fault]
        with storage.draft(f"{weed}/{place}") as draft:  # as shards are put
            draft.write(large)
            draft.put()
        assert storage.read_bytes(f"{weed}/{place}") == large
    assert weed_proxy.done[fault] == 4


def test_a_multipart_upload_that_fails_half_way_leaves_the_old_bytes(
    weed: str, weed_proxy: FaultyProxy, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{weed}/file", b"old")
    monkeypatch.setattr(storage, "PATIENCE_S", 0)
    weed_proxy.faults += ["passed", "passed"] + ["cut request"] * 200
    with pytest.raises(OSError, match=f"^{weed}/file: "):
        storage.put(f"{weed}/file", large)
    weed_proxy.faults.clear()
    assert storage.read_bytes(f"{weed}/file") == b"old"
    assert [file.path for file in storage.list_files(weed)] == ["file"]


ACTIONS: dict[str, Callable[[str], object]] = {
    "put": lambda uri: storage.put(uri, bytes(4 * MIB)),
    "create": lambda uri: storage.create(uri, b""),
    "read": storage.read_bytes,
    "fetch": fetch,
    "open": read_end,
    "list": lambda uri: list(storage.list_files(uri)),
    "exists": storage.exists,
    "delete": storage.delete,
}


@pytest.mark.parametrize(("action", "fault"), [("put", "deaf"), *((action, "hang") for action in ACTIONS)])
def test_a_server_that_hangs_for_ever_is_an_error_in_bounded_time(
    weed: str, weed_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, action: str, fault: str
) -> None:
    monkeypatch.setattr(storage, "SILENCE_S", 0.15)
    monkeypatch.setattr(storage, "SLOWEST_BYTES_S", 64 * MIB)
    monkeypatch.setattr(storage, "PATIENCE_S", 0)
    weed_proxy.faults += [fault] * 1000
    with pytest.raises(OutageError, match=f"^{weed}(/x)?: "):
        ACTIONS[action](f"{weed}/x")
    assert 0 < weed_proxy.done[fault] <= 9


@pytest.mark.parametrize("fault", ["busy", "broken", "cut request", "lost answer"])
def test_a_fault_that_lasts_is_one_error_of_the_uri(
    weed: str, weed_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0)
    weed_proxy.faults += [fault] * 1000
    for name, action in ACTIONS.items():
        if (name, fault) != ("create", "lost answer"):
            with pytest.raises(OutageError, match=f"^{weed}/x: "):
                action(f"{weed}/x")


def test_of_eight_writers_one_creates_and_knows_it(weed: str, weed_proxy: FaultyProxy) -> None:
    weed_proxy.share = 0.5
    for name in ("1", "2", "3"):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer: storage.create(f"{weed}/{name}", f"{writer}".encode()), range(8)))  # noqa: B023
        assert won.count(True) == 1
        assert storage.read_text(f"{weed}/{name}") == str(won.index(True))
    assert weed_proxy.done["passed"] < weed_proxy.done.total()


def test_of_eight_writers_one_exchanges_and_knows_it(weed: str, weed_proxy: FaultyProxy) -> None:
    for name in ("1", "2", "3"):
        weed_proxy.share = 0
        storage.put(f"{weed}/{name}", b"old")
        weed_proxy.share = 0.5
        with ThreadPoolExecutor(8) as pool:
            swap = lambda writer: storage.exchange(f"{weed}/{name}", b"old", f"{writer}".encode())  # noqa: B023, E731
            won = list(pool.map(swap, range(8)))
        assert won.count(True) == 1
        assert storage.read_text(f"{weed}/{name}") == str(won.index(True))


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(weed: str, weed_proxy: FaultyProxy) -> None:
    storage.put(f"{weed}/file", bytes(MIB))
    with storage.open_read(f"{weed}/file") as file:
        assert file.read(10) == bytes(10)
        storage.put(f"{weed}/file", b"\1" * MIB)
        file.seek(600_000)
        with pytest.raises(OSError, match=f"^{weed}/file: "):
            file.read(10)


def test_a_reader_fetches_what_is_read(weed: str, weed_proxy: FaultyProxy) -> None:
    data = os.urandom(2 * MIB)
    storage.put(f"{weed}/file", data)
    weed_proxy.sent = 0
    with storage.open_read(f"{weed}/file") as file:
        file.seek(MIB)
        assert file.read(100) == data[MIB : MIB + 100]
    assert weed_proxy.sent < 2 * storage.BUFFER_BYTES


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG1"}, "access key|AccessKeyId|[Ff]orbidden"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong/secret/wrong/secret/wrong/secret00"}, "signature|[Ff]orbidden"),
    ],
)
def test_wrong_credentials_are_one_error_that_does_not_tell_them(
    weed: str, weed_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], said: str, action: str
) -> None:
    begun = time.monotonic()
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OutageError, match=f"(?s)^{weed}(/x)?: .*({said})") as error:
        ACTIONS[action](f"{weed}/x")
    assert not any(value in str(error.value) for value in wrong.values())
    # A HEAD is refused without a reason, so what begins with one asks a second time.
    assert weed_proxy.done.total() == 1 + (action in ("open", "exists")), time.monotonic() - begun


@pytest.mark.parametrize("action", ["put", "create", "read", "fetch", "open"])
def test_a_missing_bucket_is_named_at_once(weed: str, weed_proxy: FaultyProxy, action: str) -> None:
    with pytest.raises(OutageError, match=r"^s3://no-such-bucket(/x)?: "):
        ACTIONS[action]("s3://no-such-bucket/x")
    assert weed_proxy.done.total() <= 4


@pytest.mark.parametrize("seed", [1, 2])
def test_shards_made_through_faults_are_those_on_disk(
    weed: str, weed_proxy: FaultyProxy, tmp_path: Path, seed: int
) -> None:
    there = make_shards_on_disk(tmp_path, weed)
    weed_proxy.draw, weed_proxy.share = random.Random(seed), 0.3
    weed_proxy.done.clear()
    assert make_shards(f"{weed}/videos", f"{weed}/out") == there
    faults = weed_proxy.done.total() - weed_proxy.done["passed"]
    weed_proxy.share = 0
    assert faults >= 5
    assert len(there) > 6
    assert {file.path for file in storage.list_files(f"{weed}/out")} == there.keys()


def test_shards_made_on_another_store_are_those_on_disk(gs: str, tmp_path: Path) -> None:
    there = make_shards_on_disk(tmp_path, gs)
    assert len(there) > 6
    assert make_shards(f"{gs}/videos", f"{gs}/out") == there


def make_shards_on_disk(folder: Path, store: str) -> dict[str, str]:
    """As `make_shards`, of a few videos in a folder, which lie in `videos` of the store as well afterwards."""
    videos = folder / "videos"
    write_motion_videos(videos, videos_per_class=1, seed=0, num_frames=6, size=(48, 32))
    write_broken_videos(videos / "train" / "broken")
    for path in videos.rglob("*.*"):
        storage.put(f"{store}/videos/{path.relative_to(videos)}", path.read_bytes())
    return make_shards(str(videos), str(folder / "out"))


def make_shards(videos: str, output: str) -> dict[str, str]:
    """Sha256 of each file of an extraction, by the graph's own steps without Ray."""
    settings = ExtractionSettings(decode=DecodeSettings(short_side=32), shards=ShardSettings(videos_per_shard=3))
    extract_here(plan_here(videos, output, settings=settings))
    paths = [file.path for file in storage.list_files(output)]
    return {path: hashlib.sha256(storage.read_bytes(storage.join(output, path))).hexdigest() for path in paths}
