"""What a shard holds, that equal rows are equal bytes, and that a record vouches for exactly what is there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_rows import FLOW, HEIGHT, WIDTH, convention_of, encode_shard, make_row

from pipelines import storage
from pipelines.datasets import commits, shards
from pipelines.datasets.records import read_dataset
from pipelines.datasets.shards import Commit, Row, ShardFormat, ShardSettings, commit_shard, read_rows
from pipelines.errors import ConventionError
from pipelines.media import codec
from pipelines.media.codec import CodecSettings

ROOT = Path(__file__).resolve().parents[1]
CODEC = CodecSettings(flow_codec="h264")
FORMATS: list[ShardFormat] = ["parquet", "webdataset"]
EVERY_FORMAT = pytest.mark.parametrize("settings", [ShardSettings(format=name) for name in FORMATS], ids=FORMATS)


def commit(output: str, rows: list[Row], settings: ShardSettings, failed: list[Row] | None = None) -> Commit:
    """Shard train-00000 with these rows, and without those that failed."""
    planned = [{**row, "status": "ok"} for row in rows] + (failed or [])
    convention = convention_of(CODEC)
    return commit_shard(output, "train-00000", planned, settings=settings, convention=convention, fingerprint="f")


def failure(name: str, kind: str = "truncated") -> Row:
    row: Row = dict.fromkeys(shards.VIDEO_SCHEMA.names)
    facts = {"id": name, "split": "train", "source": f"wave/{name}.mp4", "class_name": "wave", "label": 0}
    error = {"stage": "decode", "error_kind": kind, "error_message": "the file ends early"}
    return {**row, **facts, **error, "status": "quarantined", "shard": "train-00000"}


def shard_path(output: Path, settings: ShardSettings) -> Path:
    return output / "shards" / f"train-00000.{settings.extension}"


@EVERY_FORMAT
def test_rows_come_back_as_they_were(tmp_path: Path, settings: ShardSettings) -> None:
    rows = [
        make_row(CODEC, 0, id="x" * 150, start=17.0, end=27.5, flow_error_mean=0.04),
        make_row(CODEC, 1, num_frames=1, class_name="a/b 'c'", label=-1),
        make_row(CODEC, 2, id="__-日本%20~@", partial=True, timing="order", start=0.0),
    ]
    commit(str(tmp_path), rows, settings)
    found = list(read_rows(str(shard_path(tmp_path, settings))))
    assert [{name: row[name] for name in shards.ROW_SCHEMA.names} for row in found] == rows
    assert all(row["convention"] == convention_of(CODEC) for row in found)
    assert found[1]["flow"] == b""


@EVERY_FORMAT
def test_only_the_wanted_columns_are_read(tmp_path: Path, settings: ShardSettings) -> None:
    row = make_row(CODEC)
    commit(str(tmp_path), [row], settings)
    (found,) = read_rows(str(shard_path(tmp_path, settings)), columns=["flow", "id"])
    assert found == {"id": row["id"], "flow": row["flow"], "convention": convention_of(CODEC)}


@EVERY_FORMAT
def test_rows_are_read_from_s3(s3: str, settings: ShardSettings) -> None:
    rows = [make_row(CODEC, index) for index in range(10)]
    made = commit(s3, rows, settings)
    found = list(read_rows(f"{s3}/{made.file}"))
    assert [(row["id"], row["rgb"], row["flow"]) for row in found] == [
        (row["id"], row["rgb"], row["flow"]) for row in rows
    ]


def test_a_row_of_a_parquet_shard_costs_its_row_group_only(tmp_path: Path) -> None:
    commit(str(tmp_path), [make_row(CODEC, index) for index in range(10)], ShardSettings())
    shard = pq.ParquetFile(shard_path(tmp_path, ShardSettings()))
    assert [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)] == [1] * 10
    assert [row["id"] for row in read_rows(str(shard_path(tmp_path, ShardSettings())))] == [
        f"video{index}" for index in range(10)
    ]


@EVERY_FORMAT
def test_the_flow_is_read_by_the_convention_beside_it(tmp_path: Path, settings: ShardSettings) -> None:
    commit(str(tmp_path), [make_row(CODEC)], settings)
    (row,) = read_rows(str(shard_path(tmp_path, settings)))
    assert row["convention"].flow == {
        **{"codec": "h264", "bound_px": 20.0, "levels": 1023, "zero_code": 512},
        **{"layout": "u_over_v", "direction": "t_to_t+1", "unit": "px_per_frame"},
    }
    assert row["convention"].tvl1["kernel"] == "cpu-test"
    flow = codec.decode_flow(row["flow"], row["convention"].flow)
    assert flow.shape == (3, HEIGHT, WIDTH, 2)
    assert np.allclose(flow, FLOW, atol=0.2)


@EVERY_FORMAT
def test_another_convention_is_refused_with_both_named(tmp_path: Path, settings: ShardSettings) -> None:
    ours = convention_of(CODEC)
    foreign = replace(ours, flow={**ours.flow, "zero_code": 511.5})
    uri = str(tmp_path / f"foreign.{settings.extension}")
    storage.put(uri, encode_shard([make_row(CODEC)], settings, foreign))
    (row,) = read_rows(uri)
    with pytest.raises(ConventionError, match=r"'zero_code': 511\.5.*'zero_code': 512"):
        codec.decode_flow(row["flow"], row["convention"].flow)


@EVERY_FORMAT
def test_a_reader_that_expects_another_bound_refuses_with_both_named(tmp_path: Path, settings: ShardSettings) -> None:
    commit(str(tmp_path), [make_row(CODEC)], settings)
    (row,) = read_rows(str(shard_path(tmp_path, settings)))
    expected = CodecSettings(flow_codec="jpeg", bound=16).flow_convention()
    with pytest.raises(
        ConventionError, match=r"'codec': 'h264', 'bound_px': 20\.0.*'codec': 'jpeg', 'bound_px': 16\.0"
    ):
        codec.check_convention(row["convention"].flow, expected)


@EVERY_FORMAT
def test_another_schema_version_is_refused_with_both_named(tmp_path: Path, settings: ShardSettings) -> None:
    uri = str(tmp_path / f"later.{settings.extension}")
    later = replace(convention_of(CODEC), schema_version=2)
    storage.put(uri, encode_shard([make_row(CODEC)], settings, later))
    with pytest.raises(ValueError, match=r"later\.\w+ has schema version 2, this reader knows 1"):
        next(read_rows(uri))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "other.parquet")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    for name in ("other.parquet", "other.tar"):
        with pytest.raises(ValueError, match=f"{name} has schema version None"):
            list(read_rows(str(tmp_path / name)))


HASH_SHARDS = """
import hashlib, os, sys, time
os.umask(int(sys.argv[1], 8))
sys.path.insert(0, "tests")
from shard_rows import convention_of, encode_shard, make_row
from pipelines.media.codec import CodecSettings
from pipelines.datasets.shards import ShardSettings
time.time = time.time_ns = lambda: float(sys.argv[2])
codec = CodecSettings(flow_codec=sys.argv[3])
rows = [make_row(codec, index, id="日" * 60) for index in range(3)]
for name in ("parquet", "webdataset"):
    print(hashlib.sha256(encode_shard(rows, ShardSettings(format=name), convention_of(codec))).hexdigest())
"""


@pytest.mark.parametrize("flow_codec", ["h264", "jpeg"])
def test_bytes_depend_on_neither_clock_nor_place(flow_codec: str, tmp_path: Path) -> None:
    def hash_shards(umask: str, clock: str, **environment: str) -> str:
        command = [sys.executable, "-c", HASH_SHARDS, umask, clock, flow_codec]
        return subprocess.check_output(command, cwd=ROOT, env={**os.environ, **environment}, text=True)

    one = hash_shards("022", "0", TZ="UTC", LC_ALL="C", USER="a", PYTHONHASHSEED="1", HOME=str(tmp_path))
    two = hash_shards("077", "2e9", TZ="Asia/Tokyo", LC_ALL="C.UTF-8", USER="b", PYTHONHASHSEED="2")
    assert len(one.split()) == 2
    assert one == two


def test_members_of_a_tar_have_no_date_and_no_owner(tmp_path: Path) -> None:
    data = encode_shard([make_row(CODEC)], ShardSettings(format="webdataset"), convention_of(CODEC))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["video0.json", "video0.rgb.mp4", "video0.flow.mp4"]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {
        (0, 0, 0, "", 0o644)
    }


@EVERY_FORMAT
def test_the_record_tells_the_truth(tmp_path: Path, settings: ShardSettings) -> None:
    made = commit(str(tmp_path), [make_row(CODEC, index) for index in range(3)], settings)
    data = (tmp_path / str(made.file)).read_bytes()
    assert (made.num_rows, made.num_bytes, made.sha256) == (3, len(data), hashlib.sha256(data).hexdigest())
    assert list(shards.read_commits(str(tmp_path))) == [made]


@EVERY_FORMAT
def test_a_torn_shard_is_overwritten(tmp_path: Path, settings: ShardSettings) -> None:
    torn = shard_path(tmp_path, settings)
    torn.parent.mkdir()
    torn.write_bytes(b"half of it")
    assert list(shards.read_commits(str(tmp_path))) == []
    commit(str(tmp_path), [make_row(CODEC)], settings)
    assert [row["id"] for row in read_rows(str(torn))] == ["video0"]


def test_where_every_video_failed_there_is_no_file(tmp_path: Path) -> None:
    torn = shard_path(tmp_path, ShardSettings())
    torn.parent.mkdir()
    torn.write_bytes(b"left by an interrupted run")
    made = commit(str(tmp_path), [], ShardSettings(), [failure("a"), failure("b")])
    assert (made.file, made.num_rows, made.num_bytes, made.sha256) == (None, 0, 0, None)
    assert list(shards.read_commits(str(tmp_path))) == [made]
    assert not torn.exists()


def test_tables_hold_every_video_and_the_failed_ones(tmp_path: Path) -> None:
    row = make_row(CODEC, 0)
    commit(str(tmp_path), [row], ShardSettings(), [failure("a", "encrypted")])
    list(shards.write_tables(str(tmp_path), shards.read_commits(str(tmp_path))))
    videos = pq.read_table(tmp_path / "videos.parquet").to_pylist()
    assert [(video["id"], video["status"], video["flow_bytes"]) for video in videos] == [
        ("video0", "ok", len(row["flow"])),
        ("a", "quarantined", None),
    ]
    assert pq.read_table(tmp_path / "quarantine.parquet").to_pylist() == [
        {
            **{"id": "a", "source": "wave/a.mp4", "split": "train", "class_name": "wave", "shard": "train-00000"},
            **{"stage": "decode", "error_kind": "encrypted", "error_message": "the file ends early"},
        }
    ]


def test_a_table_is_read_by_its_caller_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of Arrow's that has a Python file still in its hands when the interpreter ends aborts the process."""
    readers = set()

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            readers.add(threading.get_ident())
            return super().read(size)

    pq.write_table(pa.table({"id": ["x"], "fps": [25.0]}), tmp_path / "videos.parquet")
    monkeypatch.setattr(io, "BytesIO", Watched)
    assert shards.read_table(str(tmp_path / "videos.parquet"), ["fps"]).to_pydict() == {"fps": [25.0]}
    assert readers == {threading.get_ident()}
    with pytest.raises(ValueError, match=r"videos.parquet has no column height; it has id, fps"):
        shards.read_table(str(tmp_path / "videos.parquet"), ["fps", "height"])


def test_tables_are_the_same_bytes_again_and_complete_beyond_a_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "COMMITS_PER_ROW_GROUP", 2)
    made = commit(str(tmp_path), [make_row(CODEC)], ShardSettings(), [failure("a")])

    def write() -> list[bytes]:
        assert len(list(shards.write_tables(str(tmp_path), [made] * 5))) == 5
        return [(tmp_path / f"{name}.parquet").read_bytes() for name in ("videos", "quarantine")]

    assert write() == write()
    assert pq.read_metadata(tmp_path / "videos.parquet").num_rows == 10


def test_tables_appear_when_all_records_have_passed(tmp_path: Path) -> None:
    made = commit(str(tmp_path), [make_row(CODEC)], ShardSettings())
    passing = shards.write_tables(str(tmp_path), [made, made])
    next(passing)
    assert not (tmp_path / "videos.parquet").exists()


def test_an_unfinished_output_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished data set.*run its command again"):
        read_dataset(str(tmp_path))
    (tmp_path / "dataset.json").write_text(json.dumps({"schema_version": 7}))
    with pytest.raises(ValueError, match="has schema version 7, this reader knows 1"):
        read_dataset(str(tmp_path))


def test_a_shard_holds_at_least_one_video() -> None:
    with pytest.raises(ValueError, match="--videos-per-shard is 0"):
        ShardSettings(videos_per_shard=0)


@EVERY_FORMAT
def test_one_row_is_read_by_its_place(tmp_path: Path, settings: ShardSettings) -> None:
    rows = [make_row(CODEC, index, id="x" * 150 if index == 1 else f"video{index}") for index in range(3)]
    found = commit(str(tmp_path), rows, settings)
    uri = str(shard_path(tmp_path, settings))
    for index in (2, 0, 1):
        row = shards.read_row(uri, index, ["flow"], version=str(found.sha256))
        assert row == {"id": rows[index]["id"], "flow": rows[index]["flow"], "convention": convention_of(CODEC)}
    assert "flow" not in shards.read_row(uri, 0, ["rgb"], version=str(found.sha256))
    with pytest.raises(IndexError, match="3 rows; asked for was row 3"):
        shards.read_row(uri, 3, ["rgb"], version=str(found.sha256))


@EVERY_FORMAT
def test_a_shard_that_was_replaced_is_read_anew(tmp_path: Path, settings: ShardSettings) -> None:
    uri = str(shard_path(tmp_path, settings))
    first = commit(str(tmp_path), [make_row(CODEC, index) for index in range(3)], settings)
    shards.read_row(uri, 2, ["rgb"], version=str(first.sha256))
    rows = [make_row(CODEC, 5, num_frames=9), make_row(CODEC, 6)]
    second = commit(str(tmp_path), rows, settings)
    assert shards.read_row(uri, 1, ["rgb"], version=str(second.sha256))["rgb"] == rows[1]["rgb"]


@EVERY_FORMAT
def test_of_a_shard_one_row_is_held_at_a_time(tmp_path: Path, settings: ShardSettings) -> None:
    """Whatever number of videos a shard has, it costs no more than a few copies of one."""
    blob, held = 4 << 20, []

    def make_rows() -> Iterator[Row]:
        for index in range(12):
            held.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
            yield {**make_row(CODEC, index), "rgb": bytes(blob), "flow": bytes(blob), "status": "ok"}

    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    convention = convention_of(CODEC)
    commit_shard(str(tmp_path), "a", make_rows(), settings=settings, convention=convention, fingerprint="f")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(held) - arrow < 2 * blob  # less than the last row, which has two, while the next one is made
    assert peak < 5 * blob
    assert len(list(read_rows(str(tmp_path / "shards" / f"a.{settings.extension}"), ["id"]))) == 12


@pytest.mark.parametrize(
    ("puts", "first", "num_rows"), [(0, 2, 2), (1, 2, 2), (2, 2, 3), (3, 2, 3), (1, 0, None), (2, 0, 3)]
)
def test_a_commit_that_is_interrupted_leaves_a_record_that_fits_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puts: int, first: int, num_rows: int | None
) -> None:
    """The pending record, the shard and the record are put in turn; whatever comes last, no video is lost."""
    output, settings = str(tmp_path), ShardSettings()
    rows = [make_row(CODEC, index) for index in range(3)]
    if first:
        commit(output, rows[:first], settings)
    put, left = storage.Draft.put, iter([True] * puts)

    def put_some(draft: storage.Draft) -> None:
        if not next(left, False):
            raise OSError("the storage is away")
        put(draft)

    monkeypatch.setattr(storage.Draft, "put", put_some)
    with contextlib.nullcontext() if puts == 3 else pytest.raises(OSError, match="away"):
        commit(output, rows, settings)
    monkeypatch.setattr(storage.Draft, "put", put)
    commits.settle(output, Commit)
    if num_rows is None:
        assert list(shards.read_commits(output)) == []
    else:
        record = shards.read_commit(output, "train-00000")
        assert record.num_rows == num_rows
        assert commits.fits(output, record)
    assert not list(tmp_path.glob("commits/*.pending"))


@pytest.mark.parametrize("stopped", [False, True], ids=["both end", "the one that slept is stopped"])
def test_of_two_writers_of_a_shard_the_record_is_of_the_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """While one sleeps between its shard and its record another, which lost a video to a timeout, puts both."""
    output, settings, rows = str(tmp_path), ShardSettings(), [make_row(CODEC, index) for index in range(3)]
    put, others = storage.put, []

    def put_after_another(uri: str, data: bytes) -> None:
        if uri.endswith("train-00000.json") and not others:
            others.append("writes")
            others.append(commit(output, rows[:2], settings, [failure("video2", "decoder_hung")]))
            if stopped:
                raise OSError("stopped")
        put(uri, data)

    monkeypatch.setattr(storage, "put", put_after_another)
    with pytest.raises(OSError, match="stopped") if stopped else contextlib.nullcontext():
        commit(output, rows, settings)
    assert commits.fits(output, shards.read_commit(output, "train-00000")) == stopped
    commits.settle(output, Commit)
    assert shards.read_commit(output, "train-00000") == others[1]
    assert commits.fits(output, others[1])
    assert not list(tmp_path.glob("commits/*.pending"))
