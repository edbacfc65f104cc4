"""Reads TensorFlow's checkpoint files without TensorFlow.

A checkpoint PREFIX is PREFIX.index, a sorted table (LevelDB's format) from tensor name to a BundleEntryProto, and
PREFIX.data-00000-of-00001 with the tensors' bytes. TensorFlow writes the table uncompressed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # two block handles padded to 40 bytes, and the magic number
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # TensorFlow's DataType: float, double, int32, int64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies: the fields of BundleEntryProto that reading needs."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def find_prefix(path: str | Path) -> Path | None:
    """The checkpoint prefix that a path means: itself, its .index file, or the only checkpoint in a directory."""
    path = Path(path)
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    if path.with_name(path.name + ".index").is_file():
        return path
    indices = sorted(path.glob("*.index"))
    if len(indices) > 1:
        raise ValueError(f"{path} holds {len(indices)} checkpoints ({', '.join(p.name for p in indices)}); name one.")
    return indices[0].with_suffix("") if indices else None


def read_tensors(prefix: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, in TensorFlow's axis order.

    Raises ValueError for a damaged or compressed table, several data files, a cut data file or an unknown dtype.
    """
    index = Path(f"{prefix}.index").read_bytes()
    data_path = Path(f"{prefix}.data-00000-of-00001")
    if not data_path.is_file():
        raise ValueError(f"{data_path} is missing; it belongs beside {prefix}.index.")
    entries = {name: _parse_entry(value) for name, value in _table(index) if name}
    data = np.memmap(data_path, mode="r")
    return {name: _tensor(name, entry, data) for name, entry in entries.items()}


def _table(index: bytes) -> Iterator[tuple[str, bytes]]:
    """Keys and values of a sorted table, block by block; the empty key is the header."""
    if len(index) < FOOTER or struct.unpack("<Q", index[-8:])[0] != MAGIC:
        raise ValueError(
            "This is no TensorFlow checkpoint index: its last eight bytes are not the table's magic number."
        )
    footer = index[-FOOTER:]
    _, at = _block_handle(footer, 0)  # of the meta index, which is empty
    root, _ = _block_handle(footer, at)
    for _, handle in _block_entries(index, *root):
        block, _ = _block_handle(handle, 0)
        for key, value in _block_entries(index, *block):
            yield key.decode(), value


def _block_handle(buffer: bytes, at: int) -> tuple[tuple[int, int], int]:
    """A block's (offset, size), and the position after it."""
    offset, at = _varint(buffer, at)
    size, at = _varint(buffer, at)
    return (offset, size), at


def _block_entries(index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries of one block: each key is stored as what differs from the key before. The restart array ends it."""
    block = index[offset : offset + size]
    # The byte after a block is its compression: 0 is none.
    if len(index) <= offset + size or index[offset + size] != 0:
        raise ValueError(f"The table's block at byte {offset} is cut off or compressed; only plain tables are read.")
    end = size - 4 * (1 + struct.unpack("<I", block[-4:])[0])  # the restart array, and last its length
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    """A little-endian base-128 integer, and the position after it."""
    value = shift = 0
    while True:
        if at >= len(buffer):
            raise ValueError("This TensorFlow checkpoint index is cut off within a number.")
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and raw value of each field of a protocol buffer message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        length, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        yield number, message[at : at + length]
        at += length


def _parse_entry(message: bytes) -> Entry:
    # Zeros, because protocol buffers do not store them.
    numbers = {"dtype": 0, "shard": 0, "offset": 0, "size": 0}
    shape: tuple[int, ...] = ()
    for number, value in _fields(message):
        if number == 2 and isinstance(value, bytes):
            shape = tuple(_dimension(dim) for field, dim in _fields(value) if field == 2 and isinstance(dim, bytes))
        elif isinstance(value, int) and number in (1, 3, 4, 5):
            numbers[{1: "dtype", 3: "shard", 4: "offset", 5: "size"}[number]] = value  # as in tensor_bundle.proto
    return Entry(shape=shape, **numbers)


def _dimension(message: bytes) -> int:
    return next((value for field, value in _fields(message) if field == 1 and isinstance(value, int)), 0)


def _tensor(name: str, entry: Entry, data: np.memmap) -> Tensor:
    if entry.dtype not in DTYPES or entry.shard != 0:
        raise ValueError(
            f"{name} has TensorFlow's dtype {entry.dtype} in data file {entry.shard}; known are {DTYPES}, file 0."
        )
    dtype = np.dtype(DTYPES[entry.dtype])
    if entry.size != dtype.itemsize * int(np.prod(entry.shape)) or entry.offset + entry.size > len(data):
        raise ValueError(
            f"{name} has {entry.size} bytes at {entry.offset}, which does not fit its shape or the data file."
        )
    raw = data[entry.offset : entry.offset + entry.size]
    # A copy: the file is mapped to be read, and a tensor may be written to.
    return torch.from_numpy(np.array(raw).view(dtype).reshape(entry.shape))
