"""Load the compiled kernels from a folder of this user, so that a node compiles them once.

numba keeps machine code beside the source file, or under the file's path. On a cluster that path is new for every job
and may be read-only, so each job would compile anew. Here the kernels' source is copied to a folder named by its own
hash and run from there: every worker and job of a node with the same source finds the same machine code, and another
source never finds stale code. numba writes its files atomically, so workers may start at the same moment.
NUMBA_CACHE_DIR, where set, still decides where numba puts them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).with_name("kernels.py")
MODULE = "pipelines.tvl1.kernels"


@cache
def load_kernels() -> ModuleType:
    """The module of the kernels; a first call on a node compiles at first use, later ones load machine code."""
    source = SOURCE.read_bytes()
    folder = _private_folder() / f"tvl1-{source_hash()}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SOURCE.name
    if not path.is_file() or path.read_bytes() != source:
        _write_atomically(path, source)
    return _run_module(path)


@cache
def source_hash() -> str:
    """Twelve hex digits that change with the kernels' source."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]


def _private_folder() -> Path:
    """~/.cache/two-stream-i3d, or a folder of this user under the system's temporary one where home is read-only."""
    try:
        folder = Path.home() / ".cache" / "two-stream-i3d"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except (OSError, RuntimeError):
        folder = Path(tempfile.gettempdir()) / f"two-stream-i3d-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if state.st_uid != os.getuid() or not stat.S_ISDIR(state.st_mode):
            raise PermissionError(
                f"{folder} belongs to another user; remove it, or make {Path.home()} writable"
            ) from None
        return folder


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def _run_module(path: Path) -> ModuleType:
    """Import `path` under the kernels' own name: numba's pickles name it."""
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module
