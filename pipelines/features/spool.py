"""The vectors of a video on their way to files: on this machine's disk, so that a video of hours costs no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from models.input_spec import Stream

BLOCK_BYTES = 32 << 20  # of vectors that are held, and written, at a time

Array: TypeAlias = npt.NDArray[Any]
Features: TypeAlias = Mapping[Stream, npt.NDArray[np.floating]]  # of some windows, by stream


class Vectors(Protocol):
    """The vectors of a stream's windows, (windows, [crops,] channels): a NumPy array, or `SpooledVectors`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, windows: slice, /) -> Array: ...


class SpooledVectors:
    """Vectors in a file without a name, which ends with this object or its process, however that dies."""

    def __init__(self, like: Array) -> None:
        self.dtype = like.dtype
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  it is closed with its last reference
        self._window = like.shape[1:]
        self._bytes = like[0].nbytes
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int, ...]:
        """(windows, [crops,] channels)."""
        return self._length, *self._window

    def append(self, vectors: Array) -> None:
        """The vectors of the next windows. Raises OSError where the disk is full."""
        rest = np.ascontiguousarray(vectors).data.cast("B")
        while rest:  # a disk that fills up takes less than it was given, and refuses what comes then
            rest = rest[self._file.write(rest) :]
        self._length += len(vectors)

    def __getitem__(self, windows: slice) -> Array:
        """Of neighbouring windows."""
        start, stop, _ = windows.indices(self._length)
        block = np.empty((max(0, stop - start), *self._window), self.dtype)
        self._file.seek(start * self._bytes)
        rest = block.data.cast("B")
        while rest:
            count = self._file.readinto(rest)
            assert count, "no file shrinks by itself"
            rest = rest[count:]
        self._file.seek(0, 2)
        return block


class Spool:
    """The vectors of one video, by stream, as they come."""

    def __init__(self) -> None:
        self.vectors: dict[Stream, SpooledVectors] = {}

    def add(self, features: Features) -> None:
        """What some more windows gave. Raises OSError where the disk is full."""
        for stream, vectors in features.items():
            if len(vectors):
                if stream not in self.vectors:
                    self.vectors[stream] = SpooledVectors(vectors)
                self.vectors[stream].append(vectors)


def split_blocks(length: int, item_bytes: int) -> Iterator[slice]:
    """Slices of so many items that one holds BLOCK_BYTES at most, but at least an item."""
    size = max(1, BLOCK_BYTES // max(1, item_bytes))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
