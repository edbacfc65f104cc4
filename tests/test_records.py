"""What is written as JSON is read again as it was, by the versions before and after, and damage is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from pipelines import records
from pipelines.records import Record, RecordError


class Point(NamedTuple):
    seconds: float
    videos: int


@dataclass(frozen=True, kw_only=True)
class Sample(Record):
    """A record with every kind of part that ours have."""

    name: str
    state: Literal["new", "done"] = "new"
    share: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    points: tuple[Point, ...] = ()


FULL = Sample(name="ü", state="done", share=0.1, settings={"b": [1, 2.5, None], "a": {}}, points=(Point(1.5, 2),))


def test_a_record_comes_back_as_it_was_and_its_bytes_are_sorted(tmp_path: Path) -> None:
    records.put(str(tmp_path / "record.json"), FULL)
    data = (tmp_path / "record.json").read_bytes()
    assert data.startswith('{\n "name": "ü",\n "points": [\n  [\n   1.5,\n   2\n  ]\n ],\n "sett'.encode())
    assert records.read(str(tmp_path / "record.json"), Sample) == FULL
    assert list(records.in_file_order(FULL).settings) == ["a", "b"]


def test_what_an_earlier_version_did_not_know_gets_its_default_and_what_a_later_one_adds_is_passed_over() -> None:
    assert Sample.from_json({"name": "x"}, where="here") == Sample(name="x")
    assert Sample.from_json({"name": "x", "added": {"later": 1}}, where="here") == Sample(name="x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "it lacks name"),
        (b"[]", r"it is \[\]: input should be a dictionary"),
        (b'{"name": 5}', "name is 5: input should be a valid string"),
        (b'{"name": "x", "state": "old"}', "state is 'old': input should be 'new' or 'done'"),
        (b'{"name": "x", "points": [[1.5, 2], [1]]}', r"it lacks points\.1\.1"),
        (b'{"name": ', "Expecting value"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"", "Expecting value"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=f"^{path} is damaged, or was not written by a job: .*{words}"):
        records.read(str(path), Sample)
