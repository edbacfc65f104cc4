"""The page of an extraction: what it says, and what it never lets through."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from page_folders import CONVENTION, make_lost, make_page, make_video, write_dataset, write_run
from page_text import read_page

from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.records import ShardConvention
from pipelines.media.codec import CodecSettings, decode_rgb
from pipelines.pages import base, extraction
from pipelines.pages.class_coverage import Count, cover_classes
from pipelines.pages.preview import (
    NUM_PREVIEWS,
    Preview,
    PreviewError,
    choose_videos,
    colour_flow,
    draw_wheel,
    make_preview,
)

HOSTILE = "<script>alert('x')</script>\x00\u202e"


@pytest.fixture(scope="module")
def mixed() -> list[dict]:
    """Two classes, two splits, one video lost in each way, one still and one clipped."""
    return [
        make_video("wave~1"),
        make_video("wave~still", speed=0),
        make_lost("wave~broken", "quarantined"),
        make_video("clap~1", class_name="clap", speed=40.0),
        make_lost("clap~gone", "missing", class_name="clap"),
        make_video("wave~2", split="test"),
        make_video("clap~2", class_name="clap", split="test"),
    ]


@pytest.fixture(scope="module")
def mixed_page(mixed: list[dict], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixed")
    write_run(folder, "2026-11-23T10:00:00+00:00", [[0, 0, 0, 0], [10, 3, 18, 1], [20, 5, 30, 1]])
    return make_page(folder, mixed)


def test_plots_leave_no_text_black_in_the_dark(mixed_page: str) -> None:
    texts = re.findall("<text [^>]*>", mixed_page)
    assert len(texts) > 20
    assert all("fill: var(--" in text for text in texts)


def test_webdataset_shards_make_the_same_previews(mixed: list[dict], mixed_page: str, tmp_path: Path) -> None:
    page = make_page(tmp_path, mixed, format="webdataset")
    clips = re.compile('data:video/mp4;base64,[^"]*')
    assert clips.findall(page) == clips.findall(mixed_page)


def test_names_and_messages_never_become_html(tmp_path: Path) -> None:
    videos = [
        make_video("a" + HOSTILE.replace("\x00", ""), class_name=HOSTILE),
        make_lost("b", "quarantined", class_name=HOSTILE, error_kind=HOSTILE, error_message=HOSTILE),
    ]
    dataset = write_dataset(tmp_path, videos)
    storage.put(
        str(tmp_path / "runs" / "1.json"), json.dumps({"started": HOSTILE, "host": HOSTILE, "seconds": 1}).encode()
    )
    page = Path(extraction.write_extraction_report(str(tmp_path), dataset)).read_text()
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;") >= 6
    assert "\x00" not in page
    assert "\u202e" not in page


def test_a_broken_blob_costs_its_preview_only(tmp_path: Path) -> None:
    page = make_page(tmp_path, [make_video("good"), make_video("rotten") | {"flow": b"not a video"}])
    assert page.count("data:video/mp4") == 1
    assert "No preview: frames 0 to 5 cannot be shown" in read_page(page)


def test_a_throughput_plot_takes_runs_of_any_length(mixed: list[dict], tmp_path: Path) -> None:
    write_run(tmp_path, "2026-11-23T10", [[0, 0, 0, 0]])
    write_run(tmp_path, "2026-11-23T11", [[7000, 100, 9000, 1]])
    write_run(tmp_path, "2026-11-23T12", [[t, t, 90 * t, 0] for t in range(500)])
    page = make_page(tmp_path, mixed)
    assert "hours of work" in page
    assert page.count("node-7") == 3


def class_table(*rows: tuple[str, str, str, float | None]) -> pa.Table:
    names = ("class_name", "split", "status", "flow_mean")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    return pa.Table.from_pylist(table, schema=pa.schema([shards.VIDEO_SCHEMA.field(name) for name in names]))


def test_worst_class_comes_first_with_what_is_wrong() -> None:
    videos = class_table(
        *[("fine", split, "ok", 1.0) for split in ("train", "test") for _ in range(10)],
        *[("calm", split, "ok", 0.01) for split in ("train", "test") for _ in range(10)],
        *[("half", "train", status, 1.0) for status in ("ok", "missing") for _ in range(5)],
        *[("half", "test", "ok", 1.0)] * 10,
        *[("gone", split, "quarantined", None) for split in ("train", "test")],
        ("small", "train", "ok", 1.0),
    )
    found = {entry.name: list(entry.notes.values()) for entry in cover_classes(videos, ["fine", "unplanned"], 0.1)}
    assert found == {
        "gone": ["nothing usable"],
        "half": ["25% lost"],
        "small": ["nothing in test", "few videos (the median class has 15)"],
        "calm": ["hardly any motion"],
        "fine": [],
        "unplanned": [],
    }
    assert list(found) == ["gone", "half", "small", "calm", "fine", "unplanned"]


def test_counts_and_motion_of_a_class() -> None:
    videos = class_table(*[("a", "train", "ok", float(px)) for px in range(101)], ("a", "val", "missing", None))
    (entry,) = cover_classes(videos, [], 0.1)
    assert entry.splits == {"train": Count(ok=101), "val": Count(missing=1)}
    assert entry.motion == pytest.approx([5, 25, 50, 75, 95], abs=1)


def spread_table(num_classes: int, num_videos: int) -> pa.Table:
    rows = [
        {"id": f"{c}-{i}", "class_name": f"{c:03d}", "split": split, "status": "ok", "shard": split, "num_frames": 9}
        | {"flow_mean": 1.0, "flow_clipped": 0.0}
        for split in ("test", "train")
        for c in range(num_classes)
        for i in range(num_videos)
    ]
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(("num_classes", "num_videos", "expected"), [(400, 1, 12), (2, 10, 2), (1, 3, 1)])
def test_previews_spread_over_classes_and_splits(num_classes: int, num_videos: int, expected: int) -> None:
    chosen = [
        video for video, _ in choose_videos(spread_table(num_classes, num_videos), still_px=0.1, clipped_share=0.01)
    ]
    assert len(chosen) == min(NUM_PREVIEWS, 2 * num_classes * num_videos)
    assert len({video["class_name"] for video in chosen}) == expected
    assert [video["split"] for video in chosen].count("test") == len(chosen) // 2


def test_flow_colours_follow_the_wheel() -> None:
    right, down, still, far = colour_flow(np.float32([[1, 0], [0, 1], [0, 0], [3, 0]]), 1)
    assert tuple(right) == (255, 0, 0)  # the wheel of Baker et al. begins with red, to the right
    assert tuple(down) == pytest.approx((255, 230, 0), abs=1)
    assert tuple(still) == (255, 255, 255)
    assert tuple(far) == (191, 0, 0)


def test_wheel_is_a_png_with_red_on_the_right() -> None:
    import cv2

    image = cv2.imdecode(np.frombuffer(draw_wheel(64), np.uint8), cv2.IMREAD_UNCHANGED)
    assert image.shape == (64, 64, 4)
    assert image[0, 0, 3] == 0
    assert image[32, 62, 2] > 240 > 60 > image[32, 62, 0]


def test_preview_holds_rgb_left_and_flow_right() -> None:
    preview = make_preview(make_video("a", speed=1.8) | {"convention": CONVENTION})
    frames = decode_rgb(preview.data)
    assert frames.shape == (5, 32, 64, 3)
    assert (preview.height, preview.width, preview.full_colour_px) == (32, 64, 2)
    np.testing.assert_allclose(frames[2, 16, 16], (200, 60, 20), atol=8)
    np.testing.assert_allclose(frames[2, 16, 48], colour_flow(np.float32([1.8, 0]), 2), atol=8)


def test_preview_of_a_large_frame_is_small() -> None:
    preview = make_preview(make_video("a", size=320) | {"convention": CONVENTION})
    assert (preview.height, preview.width) == (144, 288)


@pytest.mark.parametrize(("fps", "seconds"), [(3.0, 5 / 3), (0.0003, 1 / 0.0003), (5000.0, 5 / 5000)])
def test_a_video_at_its_own_rate_has_a_preview_whatever_that_is(fps: float, seconds: float) -> None:
    preview = make_preview(make_video("a") | {"fps": fps, "convention": CONVENTION})
    assert preview.seconds == pytest.approx(seconds)


def test_preview_refuses_what_has_no_flow() -> None:
    with pytest.raises(PreviewError, match="one frame"):
        make_preview(make_video("a") | {"num_frames": 1, "convention": CONVENTION})
    assert isinstance(make_preview(make_video("a") | {"convention": CONVENTION}), Preview)


def test_jpeg_flow_counts_as_still_above_its_missing_zero() -> None:
    jpeg = ShardConvention(flow=CodecSettings(flow_codec="jpeg").flow_convention())
    assert extraction.find_still_px(CONVENTION) == 0.1
    assert extraction.find_still_px(jpeg) == pytest.approx(0.1 + 2**0.5 * 20 / 255)


def test_settings_are_names_and_plain_values() -> None:
    settings = {
        "phases": [(300, 0.1 * 3), (75, 1e-07)],
        "networks": [{"uri": "s3://a", "which": None}],
        "classes": ["up", "down"],
        "annotations": [],
    }
    assert base.make_environment().filters["flat"](settings) == {
        "phases.1": "300, 0.3",
        "phases.2": "75, 1e-07",
        "networks.1.uri": "s3://a",
        "networks.1.which": "not set",
        "classes": "up, down",
        "annotations": "none",
    }
