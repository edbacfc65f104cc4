"""The lines that people read while an extraction runs and when it is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.extraction_log import (
    RunLog,
    format_estimate,
    format_failures,
    format_summary,
    format_table,
)
from pipelines.datasets.records import Dataset, ShardConvention, SplitCounts, StoredFlowError, Totals
from pipelines.extraction.estimate import Estimate
from pipelines.extraction.tally import Tally
from pipelines.extraction.tasks import Placement, Remaining
from pipelines.formatting import format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (400_000, "111 h 06 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1234, "1.23 kB"),
        (999_600, "1 MB"),
        (2.5e9, "2.5 GB"),
        (2e12, "2 TB"),
        (1.2345e15, "1,234 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        *((0, "video", "0 videos"), (1, "video", "1 video"), (2_000, "video", "2,000 videos")),
        *((1, "class", "1 class"), (2, "class", "2 classes"), (1.0, "CPU", "1 CPU"), (0.5, "CPU", "0.5 CPUs")),
    ],
)
def test_counts(count: float, noun: str, text: str) -> None:
    assert format_count(count, noun) == text


@pytest.mark.parametrize(("count", "end"), [(1, "in out/q.parquet"), (5, "and 2 more in out/q.parquet")])
def test_the_first_failures_are_named_and_where_the_rest_stands(count: int, end: str) -> None:
    row = {"error_kind": "truncated", "error_message": "the file ends early"}
    table = pa.Table.from_pylist([{"source": f"wave/{index}.mp4", **row} for index in range(count)])
    lines = format_failures(table, "out/q.parquet").splitlines()
    assert lines[0] == "failed      wave/0.mp4: the file ends early (truncated)"
    assert lines[-1].strip() == end
    assert len(lines) == min(count, 3) + 1


def test_a_table_lines_up() -> None:
    assert format_table(("split", "ok"), [("train", 12345), ("test", 7)]).splitlines() == [
        "split      ok",
        "train  12,345",
        "test        7",
    ]


DATASET = Dataset(
    fingerprint="f00d",
    settings={},
    convention=ShardConvention(flow={}),
    classes=("wave",),
    splits={"train": SplitCounts(expected=4, ok=2, missing=1, quarantined=1, frames=100)},
    quarantine_reasons={"truncated": 1},
    totals=Totals(frames=100, flow_frames=98, rgb_bytes=50_000, flow_bytes=98_000),
    flow_error_px=StoredFlowError(videos=1, mean=0.0312, rms=0.041, p999=0.3, max=1.25),
    shards=(),
)


def test_the_summary_says_what_became_of_the_videos() -> None:
    lines = format_summary(DATASET).splitlines()
    assert "train         4   2        1            1     100" in lines
    assert "truncated                 1" in lines
    assert "RGB         50 kB, 500 B a frame" in lines
    assert "flow        98 kB, 1 kB a frame" in lines
    assert "flow error  0.031 px mean, 0.041 RMS, 0.30 p99.9, 1.25 max, measured on 1 video" in lines


def test_the_summary_of_nothing_but_failures() -> None:
    splits = {"all": SplitCounts(expected=1, quarantined=1)}
    text = format_summary(replace(DATASET, splits=splits, totals=Totals(), flow_error_px=None))
    assert "truncated" in text
    assert "frame," not in text


def test_the_summary_of_videos_of_one_frame() -> None:
    totals = Totals(frames=1, flow_frames=0, rgb_bytes=700, flow_bytes=0)
    assert "flow        0 B, 0 B a frame" in format_summary(replace(DATASET, totals=totals, flow_error_px=None))


def tally(seconds: float, videos: int, frames: int = 0, quarantined: int = 0) -> Tally:
    return Tally(seconds=seconds, videos=videos, frames=frames, quarantined=quarantined)


def watch(videos: int, *tallies: Tally) -> RunLog:
    log = RunLog(shards=5)
    log.update(Remaining(shards=4, videos=videos))
    for seen in tallies:
        log.add(seen)
    return log


def test_a_progress_line_has_videos_rate_eta_and_quarantined(capsys: pytest.CaptureFixture[str]) -> None:
    watch(1000, tally(10, 250, 2500, 3), tally(40, 700, 8000, 3), tally(60, 1100, 9000, 0))
    first, *progress = capsys.readouterr().out.splitlines()
    assert first.endswith("4 shards with 1,000 videos; 1 shard done")
    assert [line.strip() for line in progress] == [
        "10 s  250 of 1,000 videos, 250 frames/s, 3 quarantined, 4 shards left",
        "40 s  700 of 1,000 videos, 200 frames/s, ETA 20 s, 3 quarantined, 4 shards left",
        "1 min 00 s  1,100 of 1,000 videos, 150 frames/s, 4 shards left",
    ]


def test_the_start_of_the_workers_is_no_part_of_the_eta(capsys: pytest.CaptureFixture[str]) -> None:
    """Six videos in 20 s after a minute of waiting: those left take as many seconds as those seen did."""
    watch(18, tally(60, 2, 50), tally(70, 5, 100), tally(80, 8, 200))
    etas = [line.partition("ETA ")[2].partition(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert etas == ["", "", "33 s"]


def test_a_log_has_no_lines_before_the_first_video_and_ever_fewer_later(capsys: pytest.CaptureFixture[str]) -> None:
    watch(100_000, *(tally(5.0 * i, 0 if i < 8 else 10 * i) for i in range(1, 720)))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].strip().startswith("40 s  80 of 100,000 videos")
    assert len(lines) < 80  # an hour, in lines of a minute at last


def test_a_run_that_waits_says_so_every_minute(capsys: pytest.CaptureFixture[str]) -> None:
    watch(2, *(tally(5.0 * i, 0) for i in range(1, 30)))
    waits = [line.strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert waits == ["1 min 00 s  0 of 2 videos, 4 shards left", "2 min 00 s  0 of 2 videos, 4 shards left"]


def test_on_a_terminal_one_line_is_kept_up_to_date(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log = watch(100, *(tally(float(i), 2 * i, 50 * i) for i in range(1, 31)))
    log.write(str(tmp_path), Placement())
    first, live = capsys.readouterr().out.split("\n")
    assert "4 shards with 100 videos" in first
    assert "60 of 100 videos" in live
    assert "50 frames/s, ETA 20 s, 4 shards left" in live
    (path,) = (tmp_path / "runs").iterdir()
    assert len(json.loads(path.read_bytes())["timeline"]) < 10


def test_a_run_leaves_a_record_and_an_idle_one_none(tmp_path: Path) -> None:
    log = RunLog(shards=1)
    log.update(Remaining(shards=0, videos=0))
    log.write(str(tmp_path), Placement())
    assert not (tmp_path / "runs").exists()
    log.add(Tally(seconds=1.0, videos=1, frames=4, quarantined=0))
    log.write(str(tmp_path), Placement(num_cpus=2))
    (path,) = (tmp_path / "runs").iterdir()
    record = json.loads(path.read_bytes())
    assert record["timeline"] == [[1.0, 1, 4, 0]]
    where = {"num_cpus": 2, "flow_actors": 0, "gpus_per_actor": 1.0, "left_out": [], "task_bytes": 0}
    assert record["placement"] == where
    assert "ray" in record["versions"]


def test_the_estimate_says_time_bytes_and_cost() -> None:
    found = Estimate(
        videos=1000,
        sampled=4,
        failed=1,
        frames=250_000,
        core_seconds=7200,
        core_seconds_low=3600,
        core_seconds_high=14_400,
        num_bytes=1_500_000_000,
    )
    text = format_estimate(found, cpus=2, cpu_hour_price=0.04)
    assert "4 of 1,000 videos, 1 of them failed" in text
    assert "time        1 h 00 min on 2 CPUs (30 min 00 s to 2 h 00 min" in text
    assert "bytes       1.5 GB" in text
    assert "cost        $0.08 for 2.00 hours of one CPU at $0.04 an hour" in text
    text = format_estimate(replace(found, core_seconds=7.2), cpus=2, cpu_hour_price=0.04)
    assert "time        3.6 s on 2 CPUs" in text
    assert "cost        less than $0.01 for 7.2 s of one CPU at $0.04 an hour" in text


def test_the_summary_says_which_side_was_the_bottleneck() -> None:
    assert "43% of the time: decoding and encoding on the CPUs" in format_summary(DATASET, gpu_share=0.43)
    assert "97% of the time: the GPUs are the bottleneck" in format_summary(DATASET, gpu_share=0.97)
    assert "GPU" not in format_summary(DATASET)
