"""Networks' weights by URI, on disk or s3://: a checkpoint, the folder of a finished run, or released files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipelines import records, storage
from pipelines.training.records import RESULT, RunResult

Which = Literal["last", "best"]


@contextlib.contextmanager
def local_checkpoint(uri: str) -> Iterator[str]:
    """A local path of a checkpoint directory, of a file of weights, or the prefix of a TensorFlow checkpoint.

    On disk itself, of one on S3 a temporary copy; where nothing is there, a path where nothing is.
    """
    if not storage.is_remote(uri):
        yield uri
        return
    # Readers of weights take local paths.
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        for name, part in _parts(uri).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(part))
        yield str(Path(folder) / uri.rpartition("/")[2])


def _parts(uri: str) -> dict[str, str]:
    """What belongs to a URI on S3, from relative local paths to URIs."""
    folder, _, name = uri.rpartition("/")
    if storage.is_dir(uri):
        return {f"{name}/{file.path}": storage.join(uri, file.path) for file in storage.list_files(uri)}
    if storage.exists(uri) and not name.endswith(".index"):
        return {name: uri}
    # A TensorFlow checkpoint is named by the prefix of its files, PREFIX.index and PREFIX.data-…, and is none itself.
    prefix = f"{name.removesuffix('.index')}."
    beside = (file.path for file in storage.list_files(folder))
    return {path: storage.join(folder, path) for path in beside if path.startswith(prefix) and "/" not in path}


def find_checkpoint(uri: str, which: Which = "last") -> str:
    """The checkpoint that a URI means: of a run's folder its last or its best one, else the URI itself."""
    result = storage.join(uri, RESULT)
    if not storage.exists(result):
        return uri
    return storage.join(uri, records.read(result, RunResult).checkpoint(which))
