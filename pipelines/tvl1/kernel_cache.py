"""Load the compiled kernels from a folder of this user, so that a node compiles them once.

numba keeps machine code beside the source file, or under the file's path. On a cluster that path is new for every job
and may be read-only, so each job would compile anew. Here the kernels' source is copied to a folder named by its own
hash and run from there: every worker and job of a node with the same source finds the same machine code, and another
source never finds stale code. Of workers that start at the same moment one has it compiled and the others
wait.
NUMBA_CACHE_DIR, where set, still decides where numba puts its files.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import numba

PACKAGE = "pipelines.tvl1.kernels"
SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.py"))


@cache
def load_kernels() -> ModuleType:
    """The package of the kernels; the first call of each on a node compiles, later ones load machine code."""
    folder = _kernel_folder()
    for source in SOURCES:
        _copy_once(source, folder / source.name)
    return _import_from(folder)


@cache
def source_hash() -> str:
    """Twelve hex digits that change with the kernels' source."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def compile_on_this_node(target: str, code: str) -> None:
    """Run `code`, which compiles for `target`, in a child process, unless a worker of this node has done so before.

    Workers that come meanwhile wait, except where the file system knows no locks: there each runs it.
    """
    done = _mark_of(target)
    with (_kernel_folder() / "lock").open("a") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"], check=True)
            done.touch()


def is_compiled_on_this_node(target: str) -> bool:
    """Whether `compile_on_this_node` has nothing to do for this target."""
    return _mark_of(target).exists()


def _mark_of(target: str) -> Path:
    """The file that says that the kernels are compiled for a target."""
    version = f"{target} python-{sys.version_info[0]}.{sys.version_info[1]} {numba.config.CACHE_DIR}"
    return _kernel_folder() / f"compiled-{hashlib.sha256(version.encode()).hexdigest()[:12]}"


@cache
def _kernel_folder() -> Path:
    folder = _private_folder() / f"tvl1-{source_hash()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _private_folder() -> Path:
    """~/.cache/two-stream-i3d, or a folder of this user under the system's temporary one where home is read-only."""
    try:
        folder = Path.home() / ".cache" / "two-stream-i3d"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except (OSError, RuntimeError):
        return _temporary_folder()


def _temporary_folder() -> Path:
    """A folder that no other user can have put code into."""
    folder = Path(tempfile.gettempdir()) / f"two-stream-i3d-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or not stat.S_ISDIR(state.st_mode):
        raise PermissionError(f"{folder} belongs to another user; remove it, or make the home folder writable")
    return folder


def _copy_once(source: Path, path: Path) -> None:
    content = source.read_bytes()
    if path.is_file() and path.read_bytes() == content:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def _import_from(folder: Path) -> ModuleType:
    """Import the copy under the package's own name, which numba writes into its files."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module
