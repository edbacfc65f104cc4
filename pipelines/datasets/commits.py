"""How a part of an output is committed: its files first, then a record that vouches for them, each by an atomic put.

A part without a record does not exist. Whoever is stopped in between, or meets another who writes the same part, leaves
a pending record, which is put first and says what the files were to be; by it `settle` finds the record that fits them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines import records, storage
from pipelines.records import Record

PENDING = ".pending"  # ending of the record of a part that is being put
FOLDER = "commits"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that a record vouches for; `path` is relative to the output."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CommitRecord(Record):
    """What vouches for a shard: its files, the settings they were made with, and the fate of each planned video.

    `shard`, such as train-00000, is what the record is called, too.
    """

    shard: str
    split: str
    fingerprint: str
    videos: list[dict[str, Any]]

    @property
    def stored(self) -> tuple[StoredFile, ...]:
        """The files of the part; none where no video of it could be used."""
        raise NotImplementedError


C = TypeVar("C", bound=CommitRecord)


def commit_uri(output: str, name: str) -> str:
    """Where the record of a part lies."""
    return storage.join(output, FOLDER, f"{name}.json")


def put_commit(output: str, commit: CommitRecord, put_files: Callable[[], None]) -> None:
    """Put the files of a part, by `put_files`, then its record."""
    record, pending = records.encode(commit), f"{commit.shard}.{secrets.token_hex(8)}{PENDING}"
    storage.put(storage.join(output, FOLDER, pending), record)
    put_files()
    storage.put(commit_uri(output, commit.shard), record)
    # Between two writers of other bytes the last record may be of the one, and the last file of the other.
    if storage.list_names(storage.join(output, FOLDER), f"{commit.shard}.", PENDING) == [pending]:
        storage.delete(storage.join(output, FOLDER, pending))


def settle(output: str, kind: type[C], *, check: Callable[[C], None] = lambda commit: None) -> None:
    """Let each part that was left with a pending record have the record that fits it; the caller holds the lock.

    A part that no record fits has none afterwards, so that it is made again. `check` is shown its record before, and
    may raise: then everything stays as it is.
    """
    for uri in _list_records(output, PENDING):
        pending = _parse(uri, storage.read_bytes(uri), kind)
        if pending.stored and fits(output, pending):
            storage.put(commit_uri(output, pending.shard), records.encode(pending))
        elif (stands := _find_commit(output, pending.shard, kind)) and not fits(output, stands):
            check(stands)
            storage.delete(commit_uri(output, pending.shard))
        storage.delete(uri)


def _find_commit(output: str, name: str, kind: type[C]) -> C | None:
    try:
        return read_commit(output, name, kind)
    except FileNotFoundError:
        return None


def fits(output: str, commit: CommitRecord) -> bool:
    """Whether the files that a record vouches for are there, to the byte; a record without files vouches for none."""
    try:
        return all(storage.hash_file(storage.join(output, file.path)) == file.sha256 for file in commit.stored)
    except FileNotFoundError:
        return False


def has_sizes(commit: CommitRecord, sizes: Mapping[str, int]) -> bool:
    """Whether the files of a record are among the listed ones (relative path → bytes) at their sizes."""
    return all(sizes.get(file.path) == file.num_bytes for file in commit.stored)


def read_commit(output: str, name: str, kind: type[C]) -> C:
    """The record of one part. Raises FileNotFoundError where there is none."""
    uri = commit_uri(output, name)
    return _parse(uri, storage.read_bytes(uri), kind)


def read_commits(output: str, kind: type[C]) -> Iterator[C]:
    """The records of an output in order of their names; none where nothing was committed yet."""
    uris = _list_records(output, ".json")
    for uri, data in zip(uris, storage.read_many(uris), strict=True):
        yield _parse(uri, data, kind)


def _list_records(output: str, ending: str) -> list[str]:
    folder = storage.join(output, FOLDER)
    files = storage.list_files(folder) if storage.is_dir(folder) else ()
    return [storage.join(folder, file.path) for file in files if file.path.endswith(ending)]


def _parse(uri: str, data: bytes, kind: type[C]) -> C:
    return kind.from_json(records.parse(data, uri), where=uri)
