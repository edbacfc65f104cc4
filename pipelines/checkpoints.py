"""Checkpoints by URI: on disk or s3://, a checkpoint directory itself or the folder of a finished run."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipelines import storage

Which = Literal["last", "best"]


@contextlib.contextmanager
def local_checkpoint(uri: str) -> Iterator[str]:
    """A local path of a checkpoint directory: itself on disk, a temporary copy of one on S3."""
    if not storage.is_remote(uri):
        yield uri
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        for file in storage.list_files(uri):
            path = Path(folder) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(storage.join(uri, file.path)))
        yield folder


def find_checkpoint(uri: str, which: Which = "last") -> str:
    """The checkpoint that a URI means: of a run's folder its last or its best one, else the URI itself."""
    result = storage.join(uri, "result.json")
    if not storage.exists(result):
        return uri
    return storage.join(uri, str(json.loads(storage.read_bytes(result))[which]))
