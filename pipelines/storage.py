"""The only place that opens, lists or writes a URI: a local path, or s3://bucket/key.

S3 goes through s3fs, which takes credentials, region and endpoint from the standard AWS variables and files
(AWS_ENDPOINT_URL for a server that is not Amazon's). Every write here is atomic: a reader sees the old bytes or the new
ones, never a part.
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


@dataclass(frozen=True)
class File:
    """One listed file: `path` relative to the listed URI with forward slashes, `size` in bytes."""

    path: str
    size: int


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI and the path inside it; ValueError for a scheme that is neither local nor S3."""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in ("s3", "file"):
        raise ValueError(f"cannot open {uri!r}: allowed are local paths and s3://bucket/key")
    options = {"use_listings_cache": False} if scheme == "s3" else {}
    return fsspec.core.url_to_fs(uri, **options)


def is_remote(uri: str) -> bool:
    """Whether the URI lies on S3."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """A URI that means the same from any working directory: relative and file:// paths become absolute ones."""
    if is_remote(uri):
        return uri.rstrip("/")
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder (on S3: a key or a prefix) is there."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.exists(path))


def is_dir(uri: str) -> bool:
    """Whether the URI is a folder (on S3: a prefix with keys under it)."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.isdir(path))


def list_files(uri: str) -> Iterator[File]:
    """All files under a folder, recursively, sorted by path; names that begin with a dot are left out."""
    filesystem, root = open_filesystem(uri)
    prefix = root.rstrip("/") + "/"
    found = filesystem.find(root, detail=True)
    for full in sorted(found):
        path = full.removeprefix(prefix)
        if not any(part.startswith(".") for part in path.split("/")):
            yield File(path, int(found[full]["size"] or 0))


def read_bytes(uri: str) -> bytes:
    """The whole file; FileNotFoundError where there is none."""
    filesystem, path = open_filesystem(uri)
    return bytes(filesystem.cat_file(path))


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
    filesystem, path = open_filesystem(uri)
    reader: IO[bytes] = filesystem.open(path, "rb")
    return reader


def put(uri: str, data: bytes) -> None:
    """Write a file atomically, over what was there: rename on disk, one put (or completed multipart) on S3."""
    filesystem, path = open_filesystem(uri)
    if is_remote(uri):
        filesystem.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def create(uri: str, data: bytes) -> bool:
    """Write a file only if there is none; of several writers exactly one gets True."""
    filesystem, path = open_filesystem(uri)
    try:
        if is_remote(uri):
            filesystem.pipe_file(path, data, mode="create")
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("xb") as file:
                file.write(data)
    except FileExistsError:
        return False
    return True


def delete(uri: str) -> None:
    """Remove a file; nothing happens where there is none."""
    filesystem, path = open_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the file's content: the file itself on disk, a temporary download for S3."""
    if not is_remote(uri):
        yield uri
        return
    filesystem, path = open_filesystem(uri)
    folder = tempfile.mkdtemp(prefix="video-")
    try:
        local = str(Path(folder) / Path(path).name)
        filesystem.get_file(path, local)
        yield local
    finally:
        shutil.rmtree(folder, ignore_errors=True)
