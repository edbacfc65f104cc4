"""Every function of storage on disk, on S3 and on another store of fsspec, where they have to behave alike."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fixtures_s3 import BucketFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import storage
from pipelines.errors import SettingsError
from pipelines.lock import lock_output
from pipelines.storage import OutageError, join

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["a b", "ünï", "日本", "#1", "50%", "50%25", "q?x=1&y", "a+b", "[x]*", "~", "a::b", "it's", 'say "x"', "@=,;$"]


@pytest.fixture(params=["disk", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on disk, one on S3, and one on a stand-in for Google's store."""
    return str(tmp_path / "root") if request.param == "disk" else f"{request.getfixturevalue(request.param)}/root"


def paths(uri: str) -> list[str]:
    return [file.path for file in storage.list_files(uri)]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_written_read_and_listed_as_it_is(root: str, name: str) -> None:
    uri = join(root, name, f"{name}.bin")
    storage.put(uri, name.encode())
    assert storage.read_text(uri) == name
    assert storage.exists(uri)
    assert storage.is_dir(join(root, name))
    assert [(file.path, file.size) for file in storage.list_files(root)] == [(f"{name}/{name}.bin", len(name.encode()))]
    with storage.local_copy(uri) as local:
        assert Path(local).read_bytes() == name.encode()
    storage.delete(uri)
    assert not storage.exists(uri)


def test_put_replaces_and_leaves_nothing_else(root: str) -> None:
    for data in (b"old", b"newer", b""):
        storage.put(join(root, "deep", "er", "file"), data)
        assert storage.read_bytes(join(root, "deep", "er", "file")) == data
    assert paths(root) == ["deep/er/file"]
    if not storage.is_remote(root):
        assert os.listdir(join(root, "deep", "er")) == ["file"]  # noqa: PTH208


def test_a_name_of_255_bytes_is_put(root: str) -> None:
    storage.put(join(root, "x" * 255), b"long")
    assert paths(root) == ["x" * 255]


def test_listing_is_recursive_sorted_and_without_hidden_files(root: str) -> None:
    for name in ("b/2", "b.x", "a", ".hidden", ".git/x", "b/.part-1", "c/d/e/f"):
        storage.put(join(root, name), b"x")
    assert paths(root) == ["a", "b.x", "b/2", "c/d/e/f"]
    assert paths(root + "/") == paths(root)
    assert paths(join(root, "b")) == ["2"]


def test_what_is_absent(root: str) -> None:
    uri = join(root, "absent")
    assert not storage.exists(uri)
    assert not storage.is_dir(uri)
    assert paths(uri) == []
    storage.delete(uri)
    for read in (storage.read_bytes, storage.open_read):
        with pytest.raises(FileNotFoundError, match="absent"):
            read(uri)


def test_a_folder_is_no_file_and_a_file_no_folder(root: str) -> None:
    storage.put(join(root, "folder", "file"), b"x")
    assert storage.exists(join(root, "folder"))
    assert not storage.is_dir(join(root, "folder", "file"))
    assert not storage.exists(join(root, "fold"))


def test_read_many_keeps_the_order(root: str) -> None:
    uris = [join(root, str(i)) for i in range(40)]
    for i, uri in enumerate(uris):
        storage.put(uri, str(i).encode())
    assert list(storage.read_many(uris[::-1])) == [str(i).encode() for i in range(40)][::-1]
    with pytest.raises(FileNotFoundError):
        list(storage.read_many([uris[0], join(root, "absent")]))


def test_of_eight_writers_one_creates(root: str) -> None:
    barrier = threading.Barrier(8)

    def race(number: int) -> bool:
        barrier.wait()
        return storage.create(join(root, "lock"), f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert storage.read_text(join(root, "lock")) == f"writer {won.index(True)}"
    assert paths(root) == ["lock"]


def test_of_eight_writers_one_exchanges(s3: str) -> None:
    uri = join(s3, "lock")
    storage.put(uri, b"old")
    barrier = threading.Barrier(8)

    def race(number: int) -> bool:
        barrier.wait()
        return storage.exchange(uri, b"old", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert storage.read_text(uri) == f"writer {won.index(True)}"


def test_open_read_seeks(root: str) -> None:
    storage.put(join(root, "f"), bytes(range(256)) * 100)
    with storage.open_read(join(root, "f")) as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"\xfd\xfe\xff"
        file.seek(256)
        assert file.read(2) == b"\x00\x01"


def test_local_copy_is_the_file_on_disk_and_a_passing_one_from_s3(root: str) -> None:
    uri = join(root, "a b.mp4")
    storage.put(uri, b"video")
    with storage.local_copy(uri) as local:
        assert Path(local).name == "a b.mp4"
    assert Path(local).exists() == (not storage.is_remote(root))


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_copy_is_a_second_name_where_that_can_be(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_disk: bool
) -> None:
    storage.put(join(root, "a"), b"shard")
    target = tmp_path / "copies" / "deep" / "b"
    if not same_disk:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk")))
    storage.link_or_copy(join(root, "a"), str(target))
    assert target.read_bytes() == b"shard"
    linked = same_disk and not storage.is_remote(root)
    assert not linked or target.samefile(join(root, "a"))
    # What replaces the file leaves the other name with the old bytes.
    storage.put(join(root, "a"), b"another")
    assert target.read_bytes() == b"shard"
    assert os.listdir(target.parent) == ["b"]  # noqa: PTH208 - hidden ones too
    with pytest.raises(FileNotFoundError):
        storage.link_or_copy(join(root, "absent"), str(target))


def test_a_byte_order_mark_is_no_text(root: str) -> None:
    storage.put(join(root, "f.csv"), "\ufeffpath,label".encode())
    assert storage.read_text(join(root, "f.csv")) == "path,label"


def test_a_failing_put_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(str(tmp_path / "file"), b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    sentence = rf"^{tmp_path}/file cannot be written: No space left on device, .* free at {tmp_path}\..* make room"
    with pytest.raises(OutageError, match=sentence):
        storage.put(str(tmp_path / "file"), b"new")
    with pytest.raises(OSError, match="No space left"):
        storage.create(str(tmp_path / "other"), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_who_reads_while_a_put_replaces_the_file_sees_the_old_bytes_whole(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.put(uri, b"old bytes")
    with storage.open_read(uri) as reader:
        storage.put(uri, b"new")
        assert reader.read() == b"old bytes"
    assert storage.read_bytes(uri) == b"new"


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    script = "import os, sys; from pipelines import storage; os.fsync = lambda file: os.kill(os.getpid(), 9);"
    script += "storage.put(sys.argv[1], b'half')"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "shards" / "a")], cwd=ROOT, check=False)
    storage.put(str(tmp_path / "shards" / "b"), b"whole")
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert paths(str(tmp_path)) == ["shards/b"]
    storage.remove_leftovers(str(tmp_path / "shards"))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["b"]


def test_sweeping_leaves_what_others_write_in_folders_below(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "rgb"):
        folder.mkdir(exist_ok=True)
        (folder / ".part-1").write_bytes(b"half")
    storage.remove_leftovers(str(tmp_path))
    storage.remove_leftovers(str(tmp_path / "absent"))
    assert [path.name for path in tmp_path.rglob(".part-*")] == [".part-1"]
    assert (tmp_path / "rgb" / ".part-1").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_what_is_put(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        storage.put(str(tmp_path / "file"), b"x")
        storage.create(str(tmp_path / "other"), b"x")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_a_failing_put_on_s3_leaves_the_old_bytes(s3: str, s3_faults: list[str]) -> None:
    storage.put(f"{s3}/file", b"old")
    s3_faults.append("403 AccessDenied")
    with pytest.raises(PermissionError, match=f"{s3}/file"):
        storage.put(f"{s3}/file", b"new")
    assert storage.read_bytes(f"{s3}/file") == b"old"


@pytest.mark.parametrize("fault", ["503 SlowDown", "500 InternalError"])
def test_a_busy_server_is_asked_again(s3: str, s3_faults: list[str], fault: str) -> None:
    s3_faults += [fault, fault]
    storage.put(f"{s3}/file", b"x")
    s3_faults += [fault, fault]
    assert storage.read_bytes(f"{s3}/file") == b"x"
    assert s3_faults == []


def test_a_large_file_goes_up_in_parts(s3: str) -> None:
    data = os.urandom(1 << 20) * 101  # s3fs sends two parts from 100 MiB on
    storage.put(f"{s3}/large", data)
    assert storage.read_bytes(f"{s3}/large") == data
    with storage.local_copy(f"{s3}/large") as local:
        assert Path(local).read_bytes() == data


ACTIONS: dict[str, Callable[[str], object]] = {
    "put": lambda uri: storage.put(uri, b""),
    "create": lambda uri: storage.create(uri, b""),
    "read": storage.read_bytes,
    "list": lambda uri: list(storage.list_files(uri)),
}


@pytest.mark.parametrize("action", ["put", "create", "read"])
def test_a_missing_bucket_is_named(s3: str, action: str) -> None:
    with pytest.raises(OutageError, match=r"s3://no-such-bucket/x: The specified bucket does not exist"):
        ACTIONS[action]("s3://no-such-bucket/x")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "ExpiredToken", "RequestTimeTooSkewed"])
@pytest.mark.parametrize("action", ACTIONS)
def test_refused_credentials_are_an_outage(s3: str, s3_faults: list[str], action: str, code: str) -> None:
    s3_faults += [f"403 {code}"] * 20
    with pytest.raises(OutageError, match=f"{s3}/x: .*{code}"):
        ACTIONS[action](f"{s3}/x")


def test_one_file_that_is_missing_or_denied_is_no_outage(s3: str, s3_faults: list[str]) -> None:
    storage.put(f"{s3}/folder/x", b"")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3}/folder/absent")
    s3_faults.append("403 AccessDenied")
    with pytest.raises(PermissionError):
        storage.read_bytes(f"{s3}/folder/x")
    storage.check_answers(f"{s3}/folder")
    storage.check_answers(f"{s3}/emptied")  # S3 says that it knows bucket and credentials, and has no such key


def test_a_store_that_denies_the_folder_too_is_an_outage(s3: str, s3_faults: list[str]) -> None:
    s3_faults.append("403 AccessDenied")
    with pytest.raises(OutageError, match=f"{s3}/folder: .*AccessDenied"):
        storage.check_answers(f"{s3}/folder")
    with pytest.raises(OutageError, match="bucket does not exist"):
        storage.check_answers("s3://no-such-bucket/folder")


def test_a_mount_that_went_away_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mount").mkdir()
    with pytest.raises(OutageError, match="mount is empty now"):
        storage.check_answers(str(tmp_path / "mount"))
    (tmp_path / "mount" / "1.mp4").write_bytes(b"x")
    storage.check_answers(str(tmp_path / "mount"))
    with pytest.raises(OutageError, match="absent: No such file"):
        storage.check_answers(str(tmp_path / "absent"))

    def stale(path: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(os, "statvfs", stale)
    with pytest.raises(OutageError, match="mount: Stale file handle"):
        storage.check_answers(str(tmp_path / "mount"))


@pytest.mark.parametrize("status", ["501 NotImplemented", "505 VersionNotSupported"])
def test_what_a_server_cannot_do_is_said_at_once(s3: str, s3_faults: list[str], status: str) -> None:
    s3_faults += [status] * 20
    with pytest.raises(OSError, match=f"{s3}/x: .*{status.split()[1]}"):
        storage.put(f"{s3}/x", b"")
    assert len(s3_faults) >= 20 - 3  # botocore's own tries


@pytest.mark.parametrize("action", ACTIONS)
def test_absent_credentials_are_an_error_of_the_uri(
    s3: str, reset_s3: Callable[[], None], monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    reset_s3()
    with pytest.raises(OutageError, match=rf"{s3}/x: Unable to locate credentials"):
        ACTIONS[action](f"{s3}/x")


def test_no_server_is_an_error_of_the_uri(
    s3: str, reset_s3: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "PATIENCE_S", 0)
    reset_s3()
    with pytest.raises(OutageError, match=rf"{s3}/x: Could not connect to the endpoint"):
        storage.put(f"{s3}/x", b"")


def test_a_console_s_empty_folder_is_no_file(s3: str) -> None:
    storage.put(f"{s3}/videos/", b"")
    storage.put(f"{s3}/videos/1.mp4", b"x")
    assert paths(s3) == ["videos/1.mp4"]
    assert paths(f"{s3}/videos") == ["1.mp4"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.mp4").write_bytes(b"x")
    root = tmp_path / "root"
    (root / "class").mkdir(parents=True)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "2.mp4").symlink_to(tmp_path / "elsewhere" / "1.mp4")
    (root / "class" / "circle").symlink_to(root)
    (root / "nowhere.mp4").symlink_to(tmp_path / "absent")
    assert paths(str(root)) == ["2.mp4", "linked/1.mp4"]


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.mp4").write_bytes(b"x")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    assert paths(str(tmp_path)) == ["a/a.mp4", "a/link/b.mp4", "b/b.mp4", "b/link/a.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        paths(str(tmp_path))


@pytest.mark.parametrize("uri", ["gopher://b/x", "S3://b/x", "https://h/x", "s3a://b/x", "gs:///x"])
def test_other_schemes_are_refused(uri: str) -> None:
    for action in (*ACTIONS.values(), storage.absolute, storage.exists, storage.is_dir, storage.open_read):
        with pytest.raises(ValueError, match=r"allowed are local paths and s3://bucket/key"):
            action(uri)


@pytest.mark.parametrize("uri", ["s3:/b/x", "s3:b/x", "s3//b/x", "S3:/b/x", "s3:///x", "s3://", "gs:/b/x", "file:b"])
def test_a_mistyped_scheme_is_no_local_path(uri: str) -> None:
    for action in (*ACTIONS.values(), storage.absolute, storage.exists):
        with pytest.raises(ValueError, match=r"allowed are local paths and s3://bucket/key"):
            action(uri)


@pytest.mark.parametrize("path", ["a:b/c", "C:/videos", "s3/b", "x/s3:/b", "./s3:/b", "12:30/x", "take 1: wave/x"])
def test_a_colon_in_a_name_is_no_scheme(path: str) -> None:
    assert not storage.is_remote(path)


def test_a_draft_leaves_nothing_unless_it_is_put(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage.put(join(root, "f"), b"old")
    for piece, end in ((b"lost", False), (b"new", True)):
        with storage.draft(join(root, "f")) as draft:
            for part in (piece, bytes(storage.PART_BYTES), piece):
                draft.write(part)
            assert storage.read_bytes(join(root, "f")) == b"old"
            if end:
                draft.put()
    data = b"new" + bytes(storage.PART_BYTES) + b"new"
    assert storage.read_bytes(join(root, "f")) == data
    assert draft.sha256 == storage.hash_file(join(root, "f")) == hashlib.sha256(data).hexdigest()
    assert paths(root) == ["f"]
    assert [path for path in tmp_path.rglob("*") if "two-stream" in path.name] == []


def test_absolute_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.absolute("a/b/") == f"{tmp_path}/a/b"
    assert storage.absolute("~/a") == f"{tmp_path}/home/a"
    assert storage.absolute(f"file://{tmp_path}/a") == f"{tmp_path}/a"
    assert storage.absolute("s3://b/x/") == "s3://b/x"


def test_file_uris_are_local_paths(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/f"
    storage.put(uri, b"x")
    assert storage.read_bytes(str(tmp_path / "f")) == b"x"
    with storage.local_copy(uri) as local:
        assert local == str(tmp_path / "f")


def test_a_store_whose_package_is_not_installed_is_said() -> None:
    for action in (storage.read_bytes, storage.exists, storage.open_read):
        with pytest.raises(SettingsError, match=r"oss://.*nstall ossfs"):
            action("oss://b/x")


def test_a_store_without_atomic_puts_is_read_only() -> None:
    """As fsspec's memory, whose name is not among those that are known to write so."""
    MemoryFileSystem().pipe_file("/bucket/x", b"there")
    assert storage.read_bytes("memory://bucket/x") == b"there"
    assert paths("memory://bucket") == ["x"]
    for write in (storage.put, storage.create):
        with pytest.raises(SettingsError, match=r"cannot write to memory://bucket/x: .*may see parts of a file"):
            write("memory://bucket/x", b"")
    with pytest.raises(SettingsError, match="cannot write to memory://bucket"), lock_output("memory://bucket/out"):
        pass


def test_what_a_store_s_own_library_raises_is_an_outage(gs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class HttpError(Exception):
        """As gcsfs has one."""

    def refuse(*given: object, **options: object) -> None:
        raise HttpError("503 backend error")

    storage.put(f"{gs}/x", b"")
    for name in ("info", "find", "cat_file", "pipe_file", "rm_file", "get_file"):
        monkeypatch.setattr(BucketFileSystem, name, refuse)
    for action in (*ACTIONS.values(), storage.exists, storage.is_dir, storage.delete, storage.check_answers):
        with pytest.raises(OutageError, match=f"{gs}/x: 503 backend error"):
            action(f"{gs}/x")


def test_an_object_of_a_store_that_is_replaced_while_it_is_read_is_an_error(gs: str) -> None:
    storage.put(f"{gs}/x", bytes(1 << 20))
    with storage.open_read(f"{gs}/x") as file:
        assert file.read(10) == bytes(10)
        storage.put(f"{gs}/x", b"\1" * (1 << 20))
        file.seek(600_000)
        with pytest.raises(OSError, match=f"{gs}/x: the object was replaced"):
            file.read(10)


def test_a_bucket_that_is_not_there_is_an_outage_and_a_file_is_none(gs: str) -> None:
    storage.put(f"{gs}/folder/x", b"")
    storage.check_answers(f"{gs}/folder")
    storage.check_answers(f"{gs}/emptied")
    with pytest.raises(OutageError, match=r"gs://no-such-bucket/folder: .*does not answer"):
        storage.check_answers("gs://no-such-bucket/folder")
