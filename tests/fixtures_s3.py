"""Real S3 servers over HTTP on this machine, for tests of whatever reads and writes s3://; a stand-in for gs://.

`s3` is moto in this process: up at once, and told which answers to get wrong. `weed` is SeaweedFS in one of its own,
and `weed_proxy` the network before it.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import fsspec
import pytest
import s3fs
from faulty_s3 import FaultyProxy, running_proxy
from fsspec.implementations.memory import MemoryFileSystem
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from seaweed import Seaweed, running_seaweed
from werkzeug.serving import make_server

Answer = Iterable[bytes]


class FaultyApp:
    """The S3 server; while `faults` holds status lines, such as `503 SlowDown`, requests are answered with those.

    After `done 503 SlowDown` the request is carried out and only its answer lost.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        if not self.faults:
            return self.app(environ, start_response)
        status = self.faults.pop(0)
        if status.startswith("done "):
            list(self.app(environ, lambda *_: None))
            status = status.removeprefix("done ")
        start_response(status, [("Content-Type", "application/xml"), ("Connection", "close")])
        if environ["REQUEST_METHOD"] == "HEAD":
            return []
        code = status.split()[1]
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, FaultyApp]]:
    """The address of the server, and the server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = FaultyApp()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    s3fs.S3FileSystem.clear_instance_cache()  # instances remember the server that they were made for
    yield f"http://127.0.0.1:{server.server_port}", app
    server.shutdown()
    thread.join()


@pytest.fixture
def s3(s3_server: tuple[str, FaultyApp], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, as s3://NAME; the environment, child processes' too, leads to its server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server[0])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}"
    s3_server[1].faults.clear()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A SeaweedFS server with its bucket `data`."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def weed(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty folder of SeaweedFS, as s3://data/NAME; the environment, child processes' too, leads to its server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://data/{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def weed_proxy(weed: str, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the server of `weed`, to which the environment leads: tell it what to do to requests."""
    with running_proxy(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy


@pytest.fixture
def reset_s3(s3: str) -> Iterator[Callable[[], None]]:
    """To be called where a test changes the environment of `s3`."""
    yield s3fs.S3FileSystem.clear_instance_cache
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_faults(s3: str, s3_server: tuple[str, FaultyApp]) -> list[str]:
    """Status lines that the server of `s3` answers its next requests with."""
    return s3_server[1].faults


class BucketFileSystem(MemoryFileSystem):
    """What fsspec makes of a store of objects, in this process's memory: gcsfs and adlfs have the same methods."""

    protocol = ("gs",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    one_at_a_time = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return f"/{path.removeprefix('gs://').strip('/')}".rstrip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with self.one_at_a_time:  # a server's look and its write are one
            super().pipe_file(path, value, mode=mode, **options)


@pytest.fixture
def gs() -> Iterator[str]:
    """An empty bucket of a stand-in for Google's store, as gs://NAME."""
    fsspec.register_implementation("gs", BucketFileSystem, clobber=True)
    yield f"gs://test-{uuid.uuid4().hex[:12]}"
    fsspec.register_implementation("gs", "gcsfs.GCSFileSystem", clobber=True)
    BucketFileSystem.store.clear()
