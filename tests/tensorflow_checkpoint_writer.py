"""Writes TensorFlow checkpoint files of float tensors, as TensorFlow lays them out: sorted table and data file."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

MAGIC = 0xDB4775248B80FB57
RESTART_INTERVAL = 16


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""  # proto3 leaves zeros out


def message(field: int, body: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(body)) + body


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Prefix-compressed entries, whole keys at every restart, then the restarts, then no compression and a checksum."""
    out, restarts, previous = bytearray(), [], b""
    for index, (key, value) in enumerate(entries):
        shared = 0
        if index % RESTART_INTERVAL == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    restarts = restarts or [0]
    out += struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))
    return bytes(out) + b"\0" + b"\xde\xad\xbe\xef"


def write_checkpoint(prefix: Path, tensors: Mapping[str, Tensor], *, entries_per_block: int = 40) -> None:
    data, entries = bytearray(), [(b"", number(1, 1) + message(3, number(1, 1)))]
    for name in sorted(tensors, key=str.encode):
        raw = tensors[name].contiguous().numpy().tobytes()
        shape = b"".join(message(2, number(1, size)) for size in tensors[name].shape)
        checksum = varint(6 << 3 | 5) + b"\x01\x02\x03\x04"
        value = number(1, 1) + message(2, shape) + number(4, len(data)) + number(5, len(raw)) + checksum
        entries.append((name.encode(), value))
        data += raw
    table, handles = bytearray(), []
    for first in range(0, len(entries), entries_per_block):
        part = entries[first : first + entries_per_block]
        body = block(part)
        handles.append((part[-1][0] + b"\x7f", varint(len(table)) + varint(len(body) - 5)))
        table += body
    footer = b""
    for body in (block([]), block(handles)):
        footer += varint(len(table)) + varint(len(body) - 5)
        table += body
    table += footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    Path(f"{prefix}.index").write_bytes(bytes(table))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(bytes(data))
