"""What is written as JSON is read again as it was, by the versions before and after, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from pipelines import records
from pipelines.datasets.records import Dataset, Totals, read_dataset
from pipelines.datasets.shards import Commit
from pipelines.errors import RecordError
from pipelines.evaluation.records import Evaluation
from pipelines.extraction.records import ExtractionRun, PlanRecord
from pipelines.records import Record
from pipelines.search.records import Outcome, SearchSettings, Trial, read_outcome
from pipelines.training.records import RunRecord, RunResult, read_metrics

# Files that the jobs wrote when these records were still dicts: the format is what these are.
FILES = Path(__file__).parent / "records"
KINDS: dict[str, type[Record]] = {
    "commit.json": Commit,
    "dataset.json": Dataset,
    "evaluation.json": Evaluation,
    "extraction-run.json": ExtractionRun,
    "outcome.json": Outcome,
    "plan.json": PlanRecord,
    "result.json": RunResult,
    "run.json": RunRecord,
    "sweep.json": SearchSettings,
    "trial.json": Trial,
}


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
    records.write(str(tmp_path / "record.json"), FULL)
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


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_before_is_read_and_written_as_the_same_bytes(name: str) -> None:
    record = records.read(str(FILES / name), KINDS[name])
    assert records.encode(record) == (FILES / name).read_bytes()
    assert records.in_file_order(record) == record


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_of_file_is_spoilt_by_what_a_later_version_adds(name: str, tmp_path: Path) -> None:
    values = json.loads((FILES / name).read_text())
    (tmp_path / name).write_bytes(records.encode({**values, "added": {"later": [1]}}))
    assert records.read(str(tmp_path / name), KINDS[name]) == records.read(str(FILES / name), KINDS[name])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"schema_version": 1}'])
def test_no_kind_of_file_is_read_from_anything(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=f"^{tmp_path / name} (is damaged|has schema version None)"):
        records.read(str(tmp_path / name), KINDS[name])


def test_a_data_set_without_a_usable_video_has_no_totals(tmp_path: Path) -> None:
    shutil.copy(FILES / "dataset.json", tmp_path)
    dataset = replace(read_dataset(str(tmp_path)), totals=Totals(), flow_error_px=None)
    assert dataset.to_json()["totals"] == {}
    records.write(str(tmp_path / "dataset.json"), dataset)
    assert read_dataset(str(tmp_path)) == dataset


def test_settings_that_do_not_say_how_videos_were_decoded_are_named(tmp_path: Path) -> None:
    shutil.copy(FILES / "dataset.json", tmp_path)
    dataset = read_dataset(str(tmp_path))
    assert (dataset.sampling.fps, dataset.sampling.short_side) == (25, 256)
    with pytest.raises(RecordError, match=r"^settings\.decode of dataset\.json is damaged"):
        replace(dataset, settings={}).sampling  # noqa: B018


def test_the_lines_of_a_training_are_read_by_kind(tmp_path: Path) -> None:
    shutil.copy(FILES / "metrics.jsonl", tmp_path)
    log = read_metrics(str(tmp_path))
    assert [(line.step, line.clips, line.top1) for line in log.train] == [(20, 160, 0.2125)]
    assert [(line.step, line.val_top1, line.val_videos) for line in log.validation] == [(20, 1 / 6, 6)]
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1\n')
    with pytest.raises(RecordError, match=rf"^line 1 of {tmp_path}/metrics\.jsonl is damaged"):
        read_metrics(str(tmp_path))


def test_the_result_of_a_training_is_not_taken_for_that_of_a_search(tmp_path: Path) -> None:
    shutil.copy(FILES / "result.json", tmp_path)
    with pytest.raises(RecordError, match=r"is not the result of a sweep: give the --output of jobs/tune\.py"):
        read_outcome(str(tmp_path))
