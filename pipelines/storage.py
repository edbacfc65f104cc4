"""The only place that opens, lists or writes a URI: a local path, s3://bucket/key, or one of another store.

S3 goes through s3fs, which takes credentials, region and endpoint from the standard AWS variables and files
(AWS_ENDPOINT_URL for a server that is not Amazon's). Any other scheme is that of an fsspec file system that is
installed: gs:// (gcsfs), az:// (adlfs), and so on. Every write here is atomic: a reader sees the old bytes or the new
ones, never a part. Stores that are not known to write so (see ATOMIC) are read only. Whatever is wrong with a file, a
bucket, credentials or the network is an OSError naming the URI: an OutageError where the store itself is at fault,
which no other file of it would escape.

Other stores' own libraries try again what may pass. S3 that throttles, breaks, cuts connections or is away is asked
again here, in two layers. botocore repeats single requests, a part of a large file among them: three attempts in its
"standard" mode, or what AWS_MAX_ATTEMPTS says. Around it, a whole read or write is repeated for PATIENCE_S, at least
TRIES times. s3fs has a third layer, in places twice, which is off: multiplied, they would wait for a server that hangs
for half an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import hashlib
import io
import logging
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
from fsspec.callbacks import Callback

from pipelines import scratch
from pipelines.errors import OutageError, SettingsError
from pipelines.formatting import format_bytes

UNFINISHED = ".part-"  # how names of files begin that are being written

CONNECT_S = 5.0  # for a connection to be made
SILENCE_S = 20.0  # without a byte of an answer, after which a request counts as lost
PATIENCE_S = 120.0  # that a read or write is repeated for: a server that restarts, a minute of throttling
TRIES = 3  # of a read or write that takes longer than that
SLOWEST_BYTES_S = 1 << 18  # of an upload; nothing else notices a server that takes no bytes and says nothing
PART_BYTES = 16 << 20  # of an upload
PARTS_AT_ONCE = 4  # each is held in memory
BUFFER_BYTES = 1 << 18  # what a reader fetches at a time where less is asked for
HASHED_BYTES = 8 << 20  # at a time: a file may be larger than what a worker has left of memory

# Besides 5xx. NoSuchUpload: a large file was completed, the answer got lost, and the repetition found nothing to do.
_TRANSIENT_STATUS = (408, 409, 429)
_LASTING_STATUS = (501, 505)  # the server will not learn it meanwhile
_TRANSIENT_CODES = ("BadDigest", "IncompleteBody", "NoSuchUpload", "RequestTimeout", "XAmzContentSHA256Mismatch")
_RENEW = ". Renew the AWS credentials, then run the same command again"
_NAME = ". Check the bucket's name, the region and the endpoint"
# Refusals that no other file of the store would escape, and what to do.
_OUTAGES = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"), _RENEW),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestExpired", "InvalidSecurity"), _RENEW),
    **dict.fromkeys(("InvalidClientTokenId", "UnrecognizedClientException", "NotSignedUp", "AccountProblem"), _RENEW),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName", "PermanentRedirect", "AllAccessDisabled"), _NAME),
    "AuthorizationHeaderMalformed": _NAME,  # of another region
    "RequestTimeTooSkewed": ". Set this machine's clock, then run the same command again",
}
_MISTYPED = re.compile(r"(?i)(s3|file):(?!//)|s3//|[a-z][a-z0-9+.-]+:/(?!/)")
# Schemes of stores that show an object only once it is there as a whole, and create one only if there is none.
ATOMIC = ("s3", "gs", "gcs", "az", "abfs", "abfss")
_NO_STORES = ("http", "https", "ftp", "s3a", "local")  # which fsspec knows too: not for folders, or another name
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """One listed file: `path` relative to the listed URI with forward slashes, `size` in bytes."""

    path: str
    size: int


def is_remote(uri: str) -> bool:
    """Whether the URI lies on S3 or another store; SettingsError for a scheme that nothing here opens, a mistyped one,
    and for credentials in it.
    """
    scheme, separator, rest = uri.partition("://")
    bucket = rest.partition("/")[0]
    if separator and scheme != "file" and ("@" in bucket or ":" in bucket):  # the message must not repeat them
        raise SettingsError(
            f"a URI that begins with {scheme}:// names more than a bucket: allowed is {scheme}://bucket/key. "
            "Credentials and endpoint belong into the store's own variables or files (AWS_…), where nothing prints them"
        )
    known = scheme == "file" or (scheme in fsspec.available_protocols() and scheme not in _NO_STORES and bucket)
    if _MISTYPED.match(uri) or (separator and not known):
        raise SettingsError(
            f"cannot open {uri!r}: allowed are local paths and s3://bucket/key, and gs://, az:// or another scheme "
            "whose fsspec package is installed. Write ./ before a local path that begins so"
        )
    return bool(separator) and scheme != "file"


def can_exchange(uri: str) -> bool:
    """Whether `exchange` works there: of the stores S3 alone offers it through fsspec."""
    return _scheme_of(uri) == "s3"


def _scheme_of(uri: str) -> str:
    return uri.partition("://")[0] if is_remote(uri) else "file"


def absolute(uri: str) -> str:
    """A URI that means the same from any working directory: relative and file:// paths become absolute ones."""
    return uri.rstrip("/") if is_remote(uri) else str(_local(uri).absolute())


def _local(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser()


def _connect(uri: str) -> Any:
    """The file system of this process: one for all threads. SettingsError where its package is not installed.

    An object is read as one stream: whatever runs here reads many at a time, and only that way costs one request each.
    """
    scheme = _scheme_of(uri)
    if scheme != "s3":
        try:
            kind = fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise SettingsError(f"{scheme}:// cannot be opened: {error}, on every node, by pip") from error
        store = kind(**kind._get_kwargs_from_urls(uri))  # such as the host of sftp://
        store.invalidate_cache()  # of listings, which other processes change
        return store
    config = {
        "retries": {"mode": "standard"},
        "connect_timeout": CONNECT_S,
        "read_timeout": SILENCE_S,
        "max_pool_connections": 32,
    }
    s3 = fsspec.filesystem("s3", use_listings_cache=False, max_concurrency=1, config_kwargs=config)
    s3.retries = 1
    return s3


class _S3Errors(NamedTuple):
    """What s3fs raises besides OSError, by the libraries below it."""

    refusal: Any  # the server's answer, a type as the next two are
    client: Any  # of botocore itself
    parameter: Any  # which was given to that
    transient: tuple[type[Exception], ...]

    @property
    def all(self) -> tuple[Any, ...]:
        return (self.refusal, self.client, *self.transient)


@cache
def _s3_errors() -> _S3Errors:
    # Not at the top: these libraries take a quarter of a second, and most processes read from a disk.
    from aiohttp import ClientError
    from botocore import exceptions as boto

    network = (boto.HTTPClientError, boto.ConnectionError, ClientError)
    transient = (*network, asyncio.TimeoutError, TimeoutError, ConnectionError)
    return _S3Errors(boto.ClientError, boto.BotoCoreError, boto.ParamValidationError, transient)


@contextlib.contextmanager
def _explain(uri: str) -> Iterator[None]:
    """Make whatever goes wrong on the way to S3 an OSError that names the URI and no credentials."""
    try:
        yield
    except (OSError, *_s3_errors().all) as error:
        if _fills_this_disk(error):
            raise
        what = re.sub("//[^/@]*@", "//", str(error)) or "the server does not answer"
        remedy = _find_outage(error)
        if remedy is not None:
            raise OutageError(f"{uri}: {what.rstrip('.')}{remedy}") from error
        precise = isinstance(error, (FileNotFoundError, FileExistsError, PermissionError))
        raise (type(error) if precise else OSError)(f"{uri}: {what}") from error


def _fills_this_disk(error: Exception) -> bool:
    """Whether this machine's disk is full, in which no store has a part."""
    return isinstance(error, OSError) and error.errno in scratch.FULL_DISK


def _find_outage(error: BaseException | None) -> str | None:
    """What to do where not a file but the whole store is refused, as credentials and buckets are; None elsewhere."""
    errors = _s3_errors()
    while error is not None:
        if isinstance(error, errors.refusal):
            return _OUTAGES.get(error.response.get("Error", {}).get("Code", ""))
        if isinstance(error, errors.client) and not isinstance(error, (errors.parameter, *errors.transient)):
            return ""  # no credentials, or none that can be read: the message says which
        error = error.__cause__
    return None


def _on_store(uri: str, action: Callable[[Any, str], T]) -> T:
    """What the action makes of the file system and the path in it; see the module's docstring for what is repeated."""
    if _scheme_of(uri) != "s3":
        try:
            store = _connect(uri)
            return action(store, store._strip_protocol(uri))
        except SettingsError:
            raise
        except (FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError) as error:
            raise type(error)(f"{uri}: {error or type(error).__name__}") from error
        except Exception as error:  # each library has exceptions of its own, and none says more than that
            if _fills_this_disk(error):
                raise
            raise OutageError(f"{uri}: {error or type(error).__name__}") from error
    until = time.monotonic() + PATIENCE_S
    for tries, pause_s in enumerate(_pauses(), start=1):
        try:
            with _explain(uri):
                return action(_connect(uri), uri.removeprefix("s3://"))
        except OSError as error:
            if not _is_transient(error):
                raise
            if tries >= TRIES and time.monotonic() + pause_s > until:
                raise OutageError(str(error)) from error
            if tries == TRIES:
                logger.warning("%s; trying again for up to %g s", error, PATIENCE_S)
            time.sleep(pause_s)
    raise AssertionError("the pauses never end")


def _pauses() -> Iterator[float]:
    """Seconds, doubling up to eight; random, so that many workers do not come back at once."""
    longest = 0.5
    while True:
        yield random.uniform(0.5, 1) * longest
        longest = min(2 * longest, 8.0)


def _is_transient(error: BaseException | None) -> bool:
    """Whether the same may succeed a moment later: the network's or the server's fault, not the request's."""
    errors = _s3_errors()
    while error is not None:
        if isinstance(error, errors.refusal):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code")
            broken = status >= 500 and status not in _LASTING_STATUS
            return broken or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
        if isinstance(error, errors.transient):
            return True
        error = error.__cause__
    return False


def _head_on_store(uri: str, action: Callable[[Any, str], T]) -> T:
    """As `_on_store`, for what begins with a HEAD: that S3 refuses without a reason, which a listing tells."""
    try:
        return _on_store(uri, action)
    except OutageError:
        raise
    except OSError:
        if can_exchange(uri):
            check_answers(uri.rpartition("/")[0] if uri.count("/") > 2 else uri)
        raise


def check_answers(folder: str) -> None:
    """Raise OutageError where not one file but the whole folder cannot be had any more.

    To be asked when a file is missing, denied or broken: an S3 that does not know or refuse the folder has lost that
    file only, and so has a disk whose folder is there and holds something. A mount that went away leaves neither.
    """
    try:
        if is_remote(folder):
            _on_store(folder, _list_one if can_exchange(folder) else _look_at)
        elif not _answers_on_disk(_local(folder)):
            raise OutageError(f"{folder} is empty now. Was it unmounted? Once it is back, run the same command again")
    except OutageError:
        raise
    except OSError as error:
        what = str(error).rstrip(".") if is_remote(folder) else f"{folder}: {error.strerror or error}"
        raise OutageError(f"{what}. The whole folder does not answer; the same command goes on once it does") from error


def _list_one(s3: Any, path: str) -> None:
    bucket, _, prefix = path.rstrip("/").partition("/")
    s3.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix and f"{prefix}/", MaxKeys=1)


def _look_at(store: Any, path: str) -> None:
    """FileNotFoundError where there is not even the bucket."""
    try:
        store.info(path)
    except FileNotFoundError:
        store.info(path.lstrip("/").partition("/")[0])


def _answers_on_disk(folder: Path) -> bool:
    """Whether the folder holds anything; OSError where its file system does not answer."""
    os.statvfs(folder)  # asks the server of a network's file system, where a listing may come from memory
    with os.scandir(folder) as entries:
        return next(entries, None) is not None


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder (on S3: a key or a prefix) is there."""
    if not is_remote(uri):
        return _local(uri).exists()
    if can_exchange(uri):
        return bool(_head_on_store(uri, lambda s3, path: s3.exists(path)))
    return _kind_of(uri) is not None


def is_dir(uri: str) -> bool:
    """Whether the URI is a folder (on S3: a prefix with keys under it)."""
    if not is_remote(uri):
        return _local(uri).is_dir()
    if can_exchange(uri):
        return bool(_on_store(uri, lambda s3, path: s3.isdir(path)))
    return _kind_of(uri) == "directory"


def _kind_of(uri: str) -> str | None:
    """`file`, `directory` or None; fsspec's own `exists` takes any error for an absent file."""
    try:
        return str(_on_store(uri, lambda store, path: store.info(path))["type"])
    except FileNotFoundError:
        return None


def list_files(uri: str) -> Iterator[File]:
    """All files under a folder, recursively, sorted by path; names that begin with a dot are left out.

    Links are followed, those that lead nowhere or back to a folder they lie in are left out.
    """
    sizes = _list_store(uri) if is_remote(uri) else _list_local(_local(uri))
    for path in sorted(sizes):
        if not any(part.startswith(".") for part in path.split("/")):
            yield File(path, sizes[path])


def _list_store(uri: str) -> dict[str, int]:
    def find(store: Any, root: str) -> dict[str, int]:
        prefix = root.rstrip("/") + "/"
        # A key that ends in a slash is what consoles make of an empty folder.
        found = {full: entry for full, entry in store.find(root, detail=True).items() if not full.endswith("/")}
        return {full.removeprefix(prefix): int(entry["size"]) for full, entry in found.items() if full != root}

    return _on_store(uri, find)


def list_names(folder: str, prefix: str, ending: str) -> list[str]:
    """Sorted names of the files that lie in a folder itself and begin and end so; none where there is no folder."""
    if not is_remote(folder):
        names = [path.name for path in _local(folder).glob(f"{glob.escape(prefix)}*")]
    elif can_exchange(folder):
        entries = _on_store(folder, lambda s3, root: s3.find(root, maxdepth=1, prefix=prefix))
        names = [entry.rpartition("/")[2] for entry in entries]
    else:
        entries = _on_store(folder, lambda store, root: store.find(root, maxdepth=1))
        names = [name for entry in entries if (name := entry.rpartition("/")[2]).startswith(prefix)]
    return sorted(name for name in names if name.endswith(ending))


def _list_local(root: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        _add_folder(root, "", frozenset(), sizes)
    except FileNotFoundError:
        return {}
    return sizes


def _add_folder(folder: Path, prefix: str, above: frozenset[tuple[int, int]], sizes: dict[str, int]) -> None:
    """Add the files below a folder; `above` are the folders it lies in, as device and inode: links may lead back."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            with _ignore_lost_links():
                if entry.is_dir():
                    _add_folder(Path(entry.path), f"{prefix}{entry.name}/", above | {here}, sizes)
                else:
                    sizes[prefix + entry.name] = entry.stat().st_size


@contextlib.contextmanager
def _ignore_lost_links() -> Iterator[None]:
    """What leads to nothing or to itself, or is gone since it was listed, is passed over."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise


def read_bytes(uri: str) -> bytes:
    """The whole file; FileNotFoundError where there is none."""
    if not is_remote(uri):
        return _local(uri).read_bytes()
    return bytes(_on_store(uri, lambda s3, path: s3.cat_file(path)))


def read_many(uris: Sequence[str]) -> Iterator[bytes]:
    """The contents of many files, in order, fetched a few at a time: on S3 one by one would take minutes."""
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(uris), 256):
            yield from pool.map(read_bytes, uris[start : start + 256])


def read_text(uri: str) -> str:
    """The whole file as UTF-8 text, a byte-order mark left out."""
    return read_bytes(uri).decode("utf-8-sig")


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary reader, which fetches only what is read. An object that is replaced meanwhile is an OSError."""
    if not is_remote(uri):
        return _local(uri).open("rb")
    return io.BufferedReader(_Reader(uri), BUFFER_BYTES)


class _Reader(io.RawIOBase):
    """Ranges of one version of an object, each fetched with as much patience as a whole one."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.position = 0
        if can_exchange(uri):
            # s3fs's own caches fetch up to 50 MiB more than what is read.
            self.file = _head_on_store(uri, lambda s3, path: s3.open(path, "rb", cache_type="none"))
            self.size = int(self.file.size)
        else:
            self.version, self.size = _on_store(uri, _version_of)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size)
        if stop <= self.position:
            return 0
        data = _on_store(self.uri, lambda store, path: self._fetch(store, path, stop))
        if data is None:
            raise OSError(f"{self.uri}: the object was replaced while it was read")
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _fetch(self, store: Any, path: str, stop: int) -> bytes | None:
        """The bytes up to `stop`; None where the object is another one now, of which S3 itself takes care."""
        if can_exchange(self.uri):
            return bytes(self.file._fetch_range(self.position, stop))
        data = store.cat_file(path, start=self.position, end=stop)
        store.invalidate_cache()
        return bytes(data) if _version_of(store, path) == (self.version, self.size) else None


def _version_of(store: Any, path: str) -> tuple[str, int]:
    """What tells an object from the one that replaces it, and its size in bytes."""
    entry = store.info(path)
    if entry["type"] == "directory":
        raise FileNotFoundError("it is a folder")
    return str(entry), int(entry["size"])


def put(uri: str, data: bytes) -> None:
    """Write a file atomically, over what was there: rename on disk, one put (or completed multipart) on a store.

    Raises SettingsError for a store that is read only here.
    """
    if is_remote(uri):
        check_writable(uri)
        _on_store(uri, lambda store, path: _upload(store, path, data))
        return
    with draft(uri) as new:
        new.write(data)
        new.put()


def link_or_copy(source: str, target: str) -> None:
    """The file `source` under another name, atomically: on one disk a second name of the same bytes, else a copy.

    For files that are only ever replaced as a whole, as all are that `put` writes.
    """
    if not is_remote(source) and not is_remote(target):
        written = _local(target).parent / f"{UNFINISHED}{secrets.token_hex(8)}"
        written.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(_local(source), written)
            written.replace(_local(target))
            return
    put(target, read_bytes(source))


def check_writable(uri: str) -> None:
    """SettingsError for a store whose writes are not known to be atomic, which is read only here."""
    if (scheme := _scheme_of(uri)) not in ("file", *ATOMIC):
        raise SettingsError(
            f"cannot write to {uri}: a reader of {scheme}:// may see parts of a file. Outputs lie on disk, s3://, "
            "gs:// or az://"
        )


def _upload(store: Any, path: str, data: bytes, **conditions: str) -> None:
    """One put, or of two parts and more a multipart upload, which nobody sees before it is complete."""
    if "s3" not in store.protocol:
        store.pipe_file(path, data, **conditions)
        return
    store.pipe_file(path, data, **_upload_options(len(data)), **conditions)


def _upload_options(num_bytes: int) -> dict[str, float]:
    timeout = TRIES * SILENCE_S + num_bytes / SLOWEST_BYTES_S
    return {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE, "timeout": timeout}


class Draft(io.RawIOBase):
    """A file that is written piece by piece, on a disk of this machine, before it is put where it belongs as a whole.

    `num_bytes` and `sha256` are of what was written so far.
    """

    def __init__(self, uri: str, path: Path) -> None:
        self.uri, self.path = uri, path
        self.num_bytes = 0
        self._sha = hashlib.sha256()
        self._file = path.open("xb")  # not tempfile: its files are closed to others, whatever the umask says

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: Any) -> int:
        with _explain_full_disk(self.uri, self.path):
            self._file.write(data)
        self._sha.update(data)
        self.num_bytes += len(data)
        return len(data)

    def finish(self) -> Path:
        """Have all that was written on the disk; the path of the file."""
        with _explain_full_disk(self.uri, self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self.path

    def put(self) -> None:
        """Make it the file at its URI, atomically, over what was there."""
        path = self.finish()
        if is_remote(self.uri):
            check_writable(self.uri)
            options = _upload_options(self.num_bytes) if can_exchange(self.uri) else {}
            _on_store(self.uri, lambda store, key: store.put_file(str(path), key, **options))
        else:
            path.replace(_local(self.uri))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was not put may not fit on the disk
            self._file.close()
        super().close()


@contextlib.contextmanager
def draft(uri: str) -> Iterator[Draft]:
    """A file to write and then to `put`, else it leaves no trace. It costs no memory, and the room of itself.

    It lies beside a local `uri`; for S3 among this machine's temporary files.
    """
    with contextlib.ExitStack() as stack:
        if is_remote(uri):
            folder = stack.enter_context(scratch.folder("upload"))
        else:
            folder = _local(uri).parent
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        stack.callback(path.unlink, missing_ok=True)
        with contextlib.closing(Draft(uri, path)) as new:
            yield new


@contextlib.contextmanager
def _explain_full_disk(uri: str, path: Path) -> Iterator[None]:
    """Make a full disk, or a used up quota, an OutageError that says where and how much is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in scratch.FULL_DISK:
            raise
        free = format_bytes(shutil.disk_usage(path.parent).free)
        raise OutageError(
            f"{uri} cannot be written: {error.strerror}, {free} free at {path.parent}. Nothing that was finished is "
            "lost: make room, then run the same command again",
        ) from error


def remove_leftovers(*folders: str) -> None:
    """Remove what killed writers left in these folders, where nobody may be writing now; S3 shows nothing of them.

    Folders within them are left alone: they may be the outputs of others, who write this moment.
    """
    for folder in folders:
        if not is_remote(folder):
            for path in _local(folder).glob(f"{UNFINISHED}*"):
                path.unlink(missing_ok=True)


def create(uri: str, data: bytes) -> bool:
    """Write a file only if there is none; of several writers exactly one gets True.

    `data` must differ from what the others write: on S3 that tells whose creation it was when an answer is lost.
    """
    if is_remote(uri):
        check_writable(uri)
        return _upload_if(uri, data, mode="create")
    try:
        with draft(uri) as new:
            new.write(data)
            os.link(new.finish(), _local(uri))
    except FileExistsError:
        return False
    return True


def exchange(uri: str, old: bytes, new: bytes) -> bool:
    """Replace a file on S3 if it still holds `old`; of several writers, whose `new` differ, exactly one gets True."""
    tag = _head_on_store(uri, lambda s3, path: s3.info(path))["ETag"]
    return read_bytes(uri) == old and _upload_if(uri, new, IfMatch=tag)


def _upload_if(uri: str, data: bytes, **conditions: str) -> bool:
    """Whether the object holds this data afterwards, which it does too where only the first answer was lost."""
    try:
        _on_store(uri, lambda s3, path: _upload(s3, path, data, **conditions))
        return True
    except OSError as error:
        refused = error.__cause__ and error.__cause__.__cause__
        refusal = _s3_errors().refusal
        failed = isinstance(refused, refusal) and refused.response["Error"].get("Code") == "PreconditionFailed"
        if not failed and (can_exchange(uri) or not isinstance(error, FileExistsError)):
            raise
    try:
        return read_bytes(uri) == data
    except FileNotFoundError:
        return False


def delete(uri: str) -> None:
    """Remove a file; nothing happens where there is none."""
    if not is_remote(uri):
        _local(uri).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        _on_store(uri, lambda s3, path: s3.rm_file(path))


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the file's content: the file itself on disk, a temporary download from elsewhere.

    Raises NoRoomError where the download is too large for this machine's disk.
    """
    if not is_remote(uri):
        yield str(_local(uri))
        return
    with scratch.folder("video") as folder:
        local = folder / uri.rpartition("/")[2][-60:]  # keys may be longer than file names
        _download(uri, local)
        yield str(local)


def _download(uri: str, local: Path) -> None:
    room = _Room(local)
    while True:
        try:
            _on_store(uri, lambda store, path: store.get_file(path, str(local), callback=room))
            return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        local.unlink(missing_ok=True)
        scratch.await_room(local.parent, room.size or 0)


class _Room(Callback):
    """Is told how large a download will be before it begins, and stops one that does not fit."""

    def __init__(self, local: Path) -> None:
        super().__init__()
        self.local = local

    def set_size(self, size: int) -> None:
        super().set_size(size)
        if size > shutil.disk_usage(self.local.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.local))


def hash_file(uri: str) -> str:
    """SHA-256 of a file, in hexadecimal; it is read in pieces."""
    sha = hashlib.sha256()
    with open_read(uri) as file:
        while chunk := file.read(HASHED_BYTES):
            sha.update(chunk)
    return sha.hexdigest()
