"""Records: what is written as JSON and read again, as frozen dataclasses, each beside whoever writes it.

Equal records are equal bytes. A file of an earlier version lacks what came later and gets the default of it, one of a
later version may hold more, which is not read; a file that is damaged, or is something else, is one error that names
it. Parts that are shown and compared but never acted upon (settings, versions) stay mappings of plain values.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from pipelines import storage
from pipelines.errors import RecordError

Values = dict[str, object]  # a JSON object
R = TypeVar("R", bound="Record")

_ADAPTERS: dict[type, TypeAdapter] = {}
MAX_REASONS = 3  # of a damaged record that its error names


class Record:
    """A dataclass that travels as JSON."""

    def to_json(self) -> Values:
        """The record as plain values."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[R], values: object, *, where: str) -> R:
        """The record that plain values mean; `where` they come from is for the RecordError of values that mean none."""
        try:
            return _adapter(cls).validate_python(values)
        except ValidationError as error:
            raise RecordError(f"{where} is damaged, or was not written by a job: {_explain(error)}") from error


def _adapter(kind: type[R]) -> TypeAdapter[R]:
    if kind not in _ADAPTERS:  # a data set has thousands of commit records, and an adapter takes a millisecond
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _explain(error: ValidationError) -> str:
    """`it lacks splits; shards.0.bytes is 'x': input should be a valid integer`."""
    reasons = []
    for problem in error.errors(include_url=False)[:MAX_REASONS]:
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            reasons.append(f"it lacks {name}")
        else:
            value, what = repr(problem["input"])[:60], problem["msg"][:1].lower() + problem["msg"][1:]
            reasons.append(f"{name or 'it'} is {value}: {what}")
    return "; ".join(reasons)


def encode(value: object) -> bytes:
    """Canonical JSON of a record or of plain values: sorted keys, so that equal values are equal bytes."""
    plain = value.to_json() if isinstance(value, Record) else value
    return (json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse(data: bytes | str, where: str) -> object:
    """The plain values of some JSON. Raises RecordError, which says `where` it lies, for what is no JSON."""
    try:
        return json.loads(data)
    except ValueError as error:  # text that is no UTF-8, too
        raise RecordError(f"{where} is damaged, or was not written by a job: {error}") from error


def in_file_order(record: R) -> R:
    """The record with its mappings in the order in which they are read again: a page made then is the same one."""
    return type(record).from_json(parse(encode(record), "a record"), where="a record")


def read(uri: str, kind: type[R]) -> R:
    """The record that a file holds. Raises FileNotFoundError where there is none, RecordError where it holds none."""
    return kind.from_json(parse(storage.read_bytes(uri), uri), where=uri)


def write(uri: str, record: Record) -> None:
    """Write a record atomically."""
    storage.put(uri, encode(record))
