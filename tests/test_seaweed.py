"""The S3 server that the integration tests run against."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3fs
from seaweed import Credentials, running_seaweed

from pipelines import storage


def test_a_killed_server_comes_back_with_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_seaweed(tmp_path / "server", Credentials("another", "secret")) as first:
        for name, value in first.environment().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        storage.put("s3://data/x", b"kept")
    with running_seaweed(tmp_path / "server", Credentials("another", "secret")) as second:
        assert (second.endpoint, second.process.pid != first.process.pid) == (first.endpoint, True)
        assert storage.read_bytes("s3://data/x") == b"kept"
    s3fs.S3FileSystem.clear_instance_cache()
