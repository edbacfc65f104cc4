"""The page of an extraction: what it says, what it never lets through, and how a browser takes it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import report as command
from pipelines import report, shards, storage
from pipelines.class_coverage import Count, cover_classes
from pipelines.codec import CodecSettings, FlowEncoder, RGBEncoder, decode_rgb
from pipelines.plan import ExtractionSettings
from pipelines.preview import NUM_PREVIEWS, Preview, PreviewError, choose_videos, colour_flow, draw_wheel, make_preview
from pipelines.shards import ShardSettings

CODEC = CodecSettings(flow_codec="h264")
CONVENTION = {
    "schema_version": shards.SCHEMA_VERSION,
    "flow": CODEC.flow_convention(),
    "rgb": {"codec": "h264"},
    "members": {"rgb": "rgb.mp4", "flow": "flow.mp4"},
}
HOSTILE = "<script>alert('x')</script>\x00\u202e"


def make_video(
    name: str, *, class_name: str = "wave", split: str = "train", speed: float = 2.0, size: int = 32
) -> dict:
    """A row of a shard: 6 frames of a grey ramp that moves to the right at `speed` px a frame."""
    rgb, flow = RGBEncoder(CODEC, height=size, width=size), FlowEncoder(CODEC, height=size, width=size)
    for _ in range(6):
        rgb.write(np.full((size, size, 3), (200, 60, 20), np.uint8))
    for _ in range(5):
        flow.write(np.broadcast_to(np.float32([speed, 0]), (size, size, 2)))
    facts = {"id": name, "class_name": class_name, "split": split, "label": 0, "source": f"{name}.mp4", "fps": 25.0}
    shape = {"num_frames": 6, "height": size, "width": size, "timing": "time", "partial": False}
    blobs = {"rgb": rgb.close(), "flow": flow.close()}
    measured = {"flow_mean": flow.mean_magnitude, "flow_clipped": flow.clipped_share, "flow_error_mean": 0.01}
    errors = {"flow_error_rms": 0.02, "flow_error_p999": 0.1, "flow_error_max": 0.3}
    row = dict.fromkeys(shards.ROW_SCHEMA.names) | facts | shape | blobs | measured | errors
    return row | {"status": "ok", "rgb_bytes": len(blobs["rgb"]), "flow_bytes": len(blobs["flow"])}


def make_lost(name: str, status: str, **facts: object) -> dict:
    row = {"id": name, "class_name": "wave", "split": "train", "status": status, "source": f"{name}.mp4"}
    if status == "quarantined":
        row |= {"stage": "decode", "error_kind": "no_frames", "error_message": "not one frame could be decoded"}
    return row | facts


def write_dataset(folder: Path | str, videos: list[dict], *, format: str = "parquet") -> dict[str, Any]:
    """Shards, tables and the dict that goes into dataset.json, one shard a split."""
    output, settings = str(folder), ShardSettings(format=format)
    for split in dict.fromkeys(video["split"] for video in videos):
        planned = [video | {"shard": f"{split}-00000"} for video in videos if video["split"] == split]
        described = [{name: video.get(name) for name in shards.VIDEO_SCHEMA.names} for video in planned]
        usable = [video for video in planned if video["status"] == "ok"]
        shards.commit_shard(
            output, f"{split}-00000", usable, described, settings=settings, convention=CONVENTION, fingerprint="f00d"
        )
    commits = list(shards.write_tables(output, shards.read_commits(output)))
    return summarise(videos, commits, settings)


def summarise(videos: list[dict], commits: list[shards.Commit], settings: ShardSettings) -> dict[str, Any]:
    usable = [video for video in videos if video["status"] == "ok"]
    kinds = [video["error_kind"] for video in videos if video["status"] == "quarantined"]
    splits = {}
    for commit in commits:
        states = [video["status"] for video in commit.videos]
        splits[commit.split] = {"expected": len(states), **{name: states.count(name) for name in asdict(Count())}}
    return {
        "schema_version": shards.SCHEMA_VERSION,
        "fingerprint": "f00d",
        "settings": json.loads(shards.to_json({**asdict(ExtractionSettings(shards=settings)), "kernel": "numba:test"})),
        "convention": CONVENTION,
        "classes": sorted({video["class_name"] for video in videos}),
        "splits": splits,
        "totals": {
            "frames": sum(video["num_frames"] for video in usable),
            "flow_frames": sum(video["num_frames"] - 1 for video in usable),
            "rgb_bytes": sum(video["rgb_bytes"] for video in usable),
            "flow_bytes": sum(video["flow_bytes"] for video in usable),
        },
        "quarantine_reasons": {kind: kinds.count(kind) for kind in kinds},
        "flow_error_px": {"videos": len(usable), "mean": 0.01, "rms": 0.02, "p999": 0.1, "max": 0.3}
        if usable
        else None,
        "shards": [{"file": c.file, "split": c.split, "bytes": c.num_bytes} for c in commits if c.file],
    }


def write_run(folder: Path, started: str, timeline: list[list[float]]) -> None:
    run = {"started": started, "host": "node-7", "seconds": timeline[-1][0], "timeline": timeline}
    run |= {"placement": {"num_cpus": 2}, "versions": {"ray": "2.60.0"}}
    storage.put(str(folder / "runs" / f"{started}.json"), json.dumps(run).encode())


def make_page(folder: Path, videos: list[dict], **settings: str) -> str:
    return Path(report.write_extraction_report(str(folder), write_dataset(folder, videos, **settings))).read_text()


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


def text_of(page: str) -> str:
    """What a reader sees: no tags, no scripts, single spaces."""
    page = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_headline_counts_what_is_there_and_what_is_not(mixed_page: str) -> None:
    text = text_of(mixed_page)
    assert "5 of 7 videos are ready. 1 in quarantine, 1 missing." in text
    assert "RGB frames 30 1.2 s of video" in text
    assert "flow error, RMS 0.020 px" in text
    assert "frames a second 1.5" in text


def test_nothing_lost_is_said(tmp_path: Path) -> None:
    text = text_of(make_page(tmp_path, [make_video("a")]))
    assert "1 of 1 videos are ready. Nothing was lost." in text
    assert "Empty. Every file that was there could be decoded." in text


def test_quarantine_shows_stage_kind_and_sentence(mixed_page: str) -> None:
    text = text_of(mixed_page)
    assert "wave~broken train decode no_frames not one frame could be decoded" in text
    assert 'href="quarantine.parquet"' in mixed_page


def test_suspicious_videos_are_listed(mixed_page: str) -> None:
    text = text_of(mixed_page)
    assert "1 nearly static video video class mean |flow|, px wave~still wave 0.000" in text
    assert "1 heavily clipped video video class beyond the bound clap~1 clap 50.0%" in text


def test_settings_convention_and_versions_are_there(mixed_page: str) -> None:
    text = text_of(mixed_page)
    for fact in (
        "f00d",
        "flow.bound_px 20.0",
        "flow.zero_code 512",
        "decode.fps 25.0",
        "kernel numba:test",
        "ray 2.60.0",
    ):
        assert fact in text


def test_previews_are_playable_videos_of_both_halves(mixed_page: str) -> None:
    assert mixed_page.count("data:video/mp4;base64,") == 5
    assert "most clipped" in mixed_page
    assert "stillest" in mixed_page


def test_the_page_is_self_contained(mixed_page: str) -> None:
    urls = re.findall(r"""(?:src|href)=["']([^"']*)""", mixed_page)
    assert {url.partition(":")[0] for url in urls if ":" in url} == {"data"}
    assert "default-src 'none'" in mixed_page


def test_plots_leave_no_text_black_in_the_dark(mixed_page: str) -> None:
    texts = re.findall("<text [^>]*>", mixed_page)
    assert len(texts) > 20
    assert all("fill: var(--" in text for text in texts)


def test_equal_input_gives_equal_bytes(mixed: list[dict], tmp_path: Path) -> None:
    first = make_page(tmp_path, mixed)
    assert make_page(tmp_path, mixed) == first


def test_webdataset_shards_make_the_same_previews(mixed: list[dict], mixed_page: str, tmp_path: Path) -> None:
    page = make_page(tmp_path, mixed, format="webdataset")
    clips = re.compile('data:video/mp4;base64,[^"]*')
    assert clips.findall(page) == clips.findall(mixed_page)


def test_a_data_set_on_s3_gets_the_same_page(mixed: list[dict], tmp_path: Path, s3: str) -> None:
    uri = report.write_extraction_report(s3, write_dataset(s3, mixed))
    assert uri == f"{s3}/report.html"
    local = make_page(tmp_path, mixed)
    assert storage.read_text(uri).replace(s3, str(tmp_path)) == local


def test_names_and_messages_never_become_html(tmp_path: Path) -> None:
    videos = [
        make_video("a" + HOSTILE.replace("\x00", ""), class_name=HOSTILE),
        make_lost("b", "quarantined", class_name=HOSTILE, error_kind=HOSTILE, error_message=HOSTILE),
    ]
    dataset = write_dataset(tmp_path, videos)
    storage.put(
        str(tmp_path / "runs" / "1.json"), json.dumps({"started": HOSTILE, "host": HOSTILE, "seconds": 1}).encode()
    )
    page = Path(report.write_extraction_report(str(tmp_path), dataset)).read_text()
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;") >= 6
    assert "\x00" not in page
    assert "\u202e" not in page


def test_empty_and_wholly_lost_data_sets_make_a_page(tmp_path: Path) -> None:
    text = text_of(make_page(tmp_path, [make_lost("a", "missing"), make_lost("b", "quarantined")]))
    assert "0 of 2 videos are ready. 1 in quarantine, 1 missing." in text
    assert "1 of 1 class needs a look" in text
    assert "nothing usable" in text
    assert "No run left a record." in text


def test_a_one_frame_video_is_counted_but_not_previewed(tmp_path: Path) -> None:
    still = make_video("photo") | {"num_frames": 1, "flow": b"", "flow_bytes": 0, "flow_mean": 0.0}
    page = make_page(tmp_path, [still])
    assert "1 of 1 videos are ready." in text_of(page)
    assert "data:video" not in page


def test_unlabelled_videos_are_one_class_without_a_name(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [make_video("a", class_name=""), make_video("b", class_name="")]) | {
        "classes": []
    }
    text = text_of(Path(report.write_extraction_report(str(tmp_path), dataset)).read_text())
    assert "No class stands out." in text
    assert "(unlabelled) 2 2.00" in text


def test_a_broken_blob_costs_its_preview_only(tmp_path: Path) -> None:
    page = make_page(tmp_path, [make_video("good"), make_video("rotten") | {"flow": b"not a video"}])
    assert page.count("data:video/mp4") == 1
    assert "No preview: frames 0 to 5 cannot be shown" in text_of(page)


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
    found = {entry.name: list(entry.notes) for entry in cover_classes(videos, ["fine", "unplanned"], 0.1)}
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


def test_preview_refuses_what_has_no_flow() -> None:
    with pytest.raises(PreviewError, match="one frame"):
        make_preview(make_video("a") | {"num_frames": 1, "convention": CONVENTION})
    assert isinstance(make_preview(make_video("a") | {"convention": CONVENTION}), Preview)


def test_jpeg_flow_counts_as_still_above_its_missing_zero() -> None:
    jpeg = {"convention": {"flow": CodecSettings(flow_codec="jpeg").flow_convention()}}
    assert report.find_still_px({"convention": CONVENTION}) == 0.1
    assert report.find_still_px(jpeg) == pytest.approx(0.1 + 2**0.5 * 20 / 255)


def test_the_command_makes_the_page_again(
    mixed: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path, mixed)
    with pytest.raises(SystemExit, match="no finished data set"):
        command.main(str(tmp_path))
    storage.put(str(tmp_path / "dataset.json"), shards.to_json(dataset))
    command.main(str(tmp_path))
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


class Browser:
    """A headless Chromium of phone size behind chromedriver, spoken to in plain WebDriver."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
        flags += ["disable-background-networking", "disable-component-update", f"user-data-dir={profile}"]
        phone = {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2}}
        options = {"args": flags, "mobileEmulation": phone}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = ""
        answer = self.ask("", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/{answer['sessionId']}"

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._address}/session{self._session}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str) -> Any:
        return self.ask("/execute/sync", {"script": script, "args": []})

    def close(self) -> None:
        request = urllib.request.Request(f"{self._address}/session{self._session}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not shutil.which("chromedriver") or not shutil.which("chromium"):
        pytest.skip("no chromium with chromedriver here")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
    try:
        wait_until(lambda: "successfully" in (tmp_path / "driver.log").read_text())
        browser = Browser(f"http://127.0.0.1:{port}", tmp_path / "profile")
        yield browser
        browser.close()
    finally:
        driver.terminate()
        driver.wait()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited a minute in vain"
        time.sleep(0.1)


def long_named(mixed: list[dict]) -> list[dict]:
    """The same with names that do not want to fit on a phone."""
    unbroken = {"id": "v" * 200, "class_name": "c" * 200, "error_kind": "k" * 200, "error_message": "m" * 900}
    return [*mixed, make_lost("a", "quarantined", **unbroken), make_video("w" * 200, class_name="d" * 200)]


@pytest.mark.slow
def test_a_phone_shows_the_page_without_errors_or_sideways_scrolling(
    mixed: list[dict], browser: Browser, tmp_path: Path
) -> None:
    write_run(tmp_path / "out", "2026-11-23T10", [[0, 0, 0, 0], [20, 5, 30, 1]])
    make_page(tmp_path / "out", long_named(mixed))
    browser.ask("/url", {"url": (tmp_path / "out" / "report.html").as_uri()})
    wait_until(lambda: browser.run("return [...document.querySelectorAll('video')].every((v) => v.readyState >= 2)"))
    assert browser.run("return document.querySelectorAll('video').length") == 6
    assert browser.run("return window.innerWidth") == 390
    assert browser.run("return document.documentElement.scrollWidth") == 390
    assert browser.ask("/se/log", {"type": "browser"}) == []


@pytest.mark.slow
def test_a_click_stops_a_preview(mixed: list[dict], browser: Browser, tmp_path: Path) -> None:
    make_page(tmp_path / "out", mixed)
    browser.ask("/url", {"url": (tmp_path / "out" / "report.html").as_uri()})
    browser.run("document.querySelector('video').scrollIntoView()")  # browsers play what is in sight
    wait_until(lambda: browser.run("return !document.querySelector('video').paused"))
    assert browser.run("const v = document.querySelector('video'); v.click(); return v.paused")
