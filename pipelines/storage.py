"""The only place that opens, lists or writes a URI: a local path, or s3://bucket/key.

S3 goes through s3fs, which takes credentials, region and endpoint from the standard AWS variables and files
(AWS_ENDPOINT_URL for a server that is not Amazon's). Every write here is atomic: a reader sees the old bytes or the new
ones, never a part. Whatever is wrong with a file, a bucket, credentials or the network is an OSError naming the URI.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec
from botocore.exceptions import BotoCoreError

UNFINISHED = ".part-"  # how names of files begin that are being written


@dataclass(frozen=True)
class File:
    """One listed file: `path` relative to the listed URI with forward slashes, `size` in bytes."""

    path: str
    size: int


def is_remote(uri: str) -> bool:
    """Whether the URI lies on S3; ValueError for a scheme that is neither local nor S3."""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in ("s3", "file"):
        raise ValueError(f"cannot open {uri!r}: allowed are local paths and s3://bucket/key")
    return scheme == "s3" and bool(separator)


def absolute(uri: str) -> str:
    """A URI that means the same from any working directory: relative and file:// paths become absolute ones."""
    return uri.rstrip("/") if is_remote(uri) else str(_local(uri).absolute())


def _local(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser()


@contextlib.contextmanager
def _open_s3(uri: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """The S3 file system and the path in it. botocore's own errors become OSErrors, and those name the URI."""
    try:
        yield fsspec.filesystem("s3", use_listings_cache=False), uri.removeprefix("s3://")
    except (FileNotFoundError, FileExistsError, PermissionError) as error:
        raise type(error)(f"{uri}: {error}") from error
    except (OSError, BotoCoreError) as error:
        raise OSError(f"{uri}: {error}") from error


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder (on S3: a key or a prefix) is there."""
    if not is_remote(uri):
        return _local(uri).exists()
    with _open_s3(uri) as (s3, path):
        return bool(s3.exists(path))


def is_dir(uri: str) -> bool:
    """Whether the URI is a folder (on S3: a prefix with keys under it)."""
    if not is_remote(uri):
        return _local(uri).is_dir()
    with _open_s3(uri) as (s3, path):
        return bool(s3.isdir(path))


def list_files(uri: str) -> Iterator[File]:
    """All files under a folder, recursively, sorted by path; names that begin with a dot are left out.

    Links are followed, those that lead nowhere or back to a folder they lie in are left out.
    """
    sizes = _list_s3(uri) if is_remote(uri) else _list_local(_local(uri))
    for path in sorted(sizes):
        if not any(part.startswith(".") for part in path.split("/")):
            yield File(path, sizes[path])


def _list_s3(uri: str) -> dict[str, int]:
    with _open_s3(uri) as (s3, root):
        prefix = root.rstrip("/") + "/"
        found = s3.find(root, detail=True)
    # A key that ends in a slash is what consoles make of an empty folder.
    return {full.removeprefix(prefix): int(found[full]["size"]) for full in found if not full.endswith("/")}


def _list_local(root: Path) -> dict[str, int]:
    sizes = {}
    for name, folders, files in os.walk(root, followlinks=True, onerror=_raise_unless_absent):
        folder = Path(name)
        folders[:] = [inner for inner in folders if not _leads_back(folder / inner)]
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # a link to nothing
                sizes[prefix + file] = (folder / file).stat().st_size
    return sizes


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _leads_back(link: Path) -> bool:
    return link.is_symlink() and link.parent.resolve().is_relative_to(link.resolve())


def read_bytes(uri: str) -> bytes:
    """The whole file; FileNotFoundError where there is none."""
    if not is_remote(uri):
        return _local(uri).read_bytes()
    with _open_s3(uri) as (s3, path):
        return bytes(s3.cat_file(path))


def read_many(uris: Sequence[str]) -> Iterator[bytes]:
    """The contents of many files, in order, fetched a few at a time: on S3 one by one would take minutes."""
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(uris), 256):
            yield from pool.map(read_bytes, uris[start : start + 256])


def read_text(uri: str) -> str:
    """The whole file as UTF-8 text, a byte-order mark left out."""
    return read_bytes(uri).decode("utf-8-sig")


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary reader, which fetches only what is read."""
    if not is_remote(uri):
        return _local(uri).open("rb")
    with _open_s3(uri) as (s3, path):
        reader: IO[bytes] = s3.open(path, "rb")
        return reader


def put(uri: str, data: bytes) -> None:
    """Write a file atomically, over what was there: rename on disk, one put (or completed multipart) on S3."""
    if not is_remote(uri):
        with _temporary_file(_local(uri), data) as written:
            written.replace(_local(uri))
        return
    with _open_s3(uri) as (s3, path):
        s3.pipe_file(path, data)


@contextlib.contextmanager
def _temporary_file(target: Path, data: bytes) -> Iterator[Path]:
    """A finished file beside the target, which is gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=UNFINISHED)
    written = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written.chmod(0o644)
        yield written
    finally:
        written.unlink(missing_ok=True)


def sweep(uri: str) -> None:
    """Remove what killed writers left under a folder, where nobody may be writing now; S3 shows nothing of them."""
    if not is_remote(uri):
        for path in _local(uri).rglob(f"{UNFINISHED}*"):
            path.unlink(missing_ok=True)


def create(uri: str, data: bytes) -> bool:
    """Write a file only if there is none; of several writers exactly one gets True."""
    try:
        if not is_remote(uri):
            with _temporary_file(_local(uri), data) as written:
                os.link(written, _local(uri))
        else:
            with _open_s3(uri) as (s3, path):
                s3.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def exchange(uri: str, old: bytes, new: bytes) -> bool:
    """Replace a file on S3 if it still holds `old`; of several writers exactly one gets True."""
    with _open_s3(uri) as (s3, path):
        tag = s3.info(path)["ETag"]
        if s3.cat_file(path) != old:
            return False
        try:
            s3.pipe_file(path, new, IfMatch=tag)
        except OSError as error:
            if "PreconditionFailed" not in str(error.__cause__):
                raise
            return False
    return True


def delete(uri: str) -> None:
    """Remove a file; nothing happens where there is none."""
    if not is_remote(uri):
        _local(uri).unlink(missing_ok=True)
        return
    with _open_s3(uri) as (s3, path), contextlib.suppress(FileNotFoundError):
        s3.rm_file(path)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the file's content: the file itself on disk, a temporary download for S3."""
    if not is_remote(uri):
        yield str(_local(uri))
        return
    folder = tempfile.mkdtemp(prefix="video-")
    try:
        local = str(Path(folder) / uri.rpartition("/")[2])
        with _open_s3(uri) as (s3, path):
            s3.get_file(path, local)
        yield local
    finally:
        shutil.rmtree(folder, ignore_errors=True)
