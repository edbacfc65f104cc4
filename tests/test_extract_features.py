"""Features as a job: whole, resumed, retried, refused, from videos and from shards, on CPUs and on pretended GPUs."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from extracted import hashes
from fixtures_features import save_networks
from fixtures_jobs import NO_GPUS, run_here, succeed

from jobs import extract_features, report
from jobs.extract_features import ExtractFeatures, Source
from models import cuda
from pipelines import storage, tvl1
from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.errors import OutageError, RunError, SettingsError, VideoError
from pipelines.extraction import flow_pool
from pipelines.extraction.flow_pool import FlowLostError
from pipelines.extraction.tasks import Placement, run_graph
from pipelines.extraction.work import find_work
from pipelines.features import frames as frames_module
from pipelines.features import pool as pool_module
from pipelines.features import spool as spool_module
from pipelines.features.actor import FeatureActor, SessionLostError
from pipelines.features.frames import StoredVideo
from pipelines.features.graph import FeatureSteps, extract
from pipelines.features.manifest import assemble, finish
from pipelines.features.plan import FeaturePlan
from pipelines.features.pool import start_pool
from pipelines.features.records import read_features
from pipelines.features.settings import FeatureSettings
from pipelines.features.task import find_kernel
from pipelines.media import codec
from pipelines.media.decode import DecodeSettings
from pipelines.media.decoder_process import process_decoder

ROOT = Path(__file__).resolve().parents[1]
JOB = str(ROOT / "jobs" / "extract_features.py")
WINDOWS = ("--window", "16", "--stride", "8")
SETTINGS = FeatureSettings(window=16, stride=8)
FLAGS = (*WINDOWS, "--videos-per-shard", "3")
LAYOUTS = ("parquet", "npy")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good videos and four broken ones."""
    folder = tmp_path_factory.mktemp("videos")
    write_motion_videos(folder, videos_per_class=1, seed=2, num_frames=30, size=(64, 48))
    write_broken_videos(folder / "train" / "broken")
    return folder


@pytest.fixture(scope="module")
def ray_cluster(ray_here: None) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


def total(output: Path, name: str) -> int:
    """A count of features.json over all splits."""
    return sum(getattr(counts, name) for counts in read_features(str(output)).splits.values())


def run(videos: Path, networks: list[str], output: Path, *more: str | Path) -> str:
    """What the job prints, run in this process to its end."""
    return succeed("extract_features", "--videos", videos, *networks, "--output", output, *FLAGS, *NO_GPUS, *more)


def config_of(videos: Path, networks: list[str], output: Path, **settings: Any) -> ExtractFeatures:
    """The same by its fields."""
    given = dict(zip(("rgb", "flow"), networks[1::2], strict=True))
    made = dataclasses.replace(SETTINGS, **settings)
    return ExtractFeatures(videos=str(videos), output=str(output), settings=made, videos_per_shard=3, **given)


class Work:
    """What the job does, step by step."""

    def __init__(self, config: ExtractFeatures, kind: type[FeatureSteps] = FeatureSteps) -> None:
        self.source = Source.open(config)
        self.kernel = find_kernel("cpu", computes_flow=self.source.task.computes_flow)
        self.plan: FeaturePlan = self.source.make_plan(self.kernel)
        self.windows = self.source.networks.windows
        self.steps = kind.of(self.plan, self.windows, backend="cpu")

    def row(self, part: str) -> dict[str, Any]:
        return next(row for row in self.plan.table.to_pylist() if part in row["id"])

    def make_here(self, *, retry: bool = False) -> None:
        for block in find_work(self.plan, retry=retry):
            self.steps.make_shard(block)
        finish(self.plan, assemble(self.plan, self.source.describe(self.kernel)))

    def run(self, placement: Placement | None = None, backend: str = "cpu") -> None:
        blocks = find_work(self.plan)
        for _ in extract(self.plan, self.windows, blocks, backend=backend, placement=placement or Placement()):
            pass
        finish(self.plan, assemble(self.plan, self.source.describe(self.kernel)))


@pytest.fixture(scope="module")
def undisturbed(
    ray_here: None, videos: Path, networks: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A finished output of each layout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for layout in LAYOUTS:
        run(videos, networks, folder / layout, "--layout", layout)
    return {layout: folder / layout for layout in LAYOUTS}


def test_features_are_those_of_a_plain_loop(
    undisturbed: dict[str, Path], videos: Path, networks: list[str], tmp_path: Path
) -> None:
    work = Work(config_of(videos, networks, tmp_path))
    path = next(videos.rglob("left_0000.mp4"))
    frames = list(process_decoder(DecodeSettings(short_side=40)).frames(path))
    streams = {stream: work.source.networks.open(stream, work.source.task.scales[stream]) for stream in ("rgb", "flow")}
    for frame in frames:
        streams["rgb"].push(frame)
    for flow in tvl1.flow(np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]), backend="cpu"):
        streams["flow"].push(codec.stack_components(codec.quantise(flow, work.source.task.scale)))
    expected = {stream: features.finish() for stream, features in streams.items()}
    (array,) = (undisturbed["npy"] / "features").glob("*left_0000.npy")
    assert np.array_equal(np.load(array), np.concatenate([expected["rgb"], expected["flow"]], axis=1))
    assert np.load(array).shape == (2, 256)
    tables = [pq.read_table(path) for path in sorted((undisturbed["parquet"] / "features").iterdir())]
    rows = [row for table in tables for row in table.to_pylist() if row["id"].endswith("left_0000")]
    assert [(row["stream"], row["window"], row["start_s"], row["end_s"]) for row in rows] == [
        (stream, window, start, start + 0.64) for stream in ("rgb", "flow") for window, start in ((0, 0.0), (1, 0.32))
    ]
    assert np.array_equal(np.array([row["features"] for row in rows[2:]], np.float32), expected["flow"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_video_is_accounted_for(undisturbed: dict[str, Path], videos: Path, layout: str) -> None:
    output = undisturbed[layout]
    found = read_features(str(output))
    assert {name: (counts.expected, counts.ok, counts.quarantined) for name, counts in found.splits.items()} == {
        "train": (10, 6, 4)
    }
    assert (found.splits["train"].frames, found.splits["train"].windows) == (180, 12)
    failed = pq.read_table(output / "quarantine.parquet").to_pylist()
    assert len(failed) == 4
    assert {row["stage"] for row in failed} == {"decode"}
    assert all(row["error_kind"] and row["error_message"] for row in failed)
    rows = pq.read_table(output / "videos.parquet").to_pylist()
    usable = {row["id"]: row for row in rows if row["status"] == "ok"}
    for name, row in usable.items():
        (path,) = videos.rglob(f"{name.rpartition('~')[2]}.mp4")
        assert row["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (row["num_frames"], row["fps"], row["windows"]) == (30, 25.0, 2)
    arrays = {path.stem for path in (output / "features").glob("*.npy")}
    assert arrays == (set(usable) if layout == "npy" else set())


def test_the_record_names_all_that_decided(undisturbed: dict[str, Path], networks: list[str]) -> None:
    found = read_features(str(undisturbed["parquet"]))
    assert (found.settings["window"], found.settings["stride"], found.precision) == (16, 8, "fp32")
    assert (found.decoding["fps"], found.decoding["short_side"]) == (25.0, 40)
    assert found.flow is not None
    assert (found.flow["bound"], found.flow["levels"], found.flow["kernel"]) == (20.0, 1023, tvl1.kernel_target("cpu"))
    assert [network["weights"] for _, network in sorted(found.networks.items())] == [networks[3], networks[1]]
    plan = json.loads((undisturbed["parquet"] / "plan.json").read_text())
    assert plan["settings"]["weights"] == {name: net["weights_sha256"] for name, net in found.networks.items()}


@pytest.mark.parametrize("more", [(), ("--verify",), ("--dry-run",)])
def test_a_second_run_needs_no_ray_and_leaves_the_same_bytes(
    undisturbed: dict[str, Path], videos: Path, networks: list[str], monkeypatch: pytest.MonkeyPatch, more: tuple[str]
) -> None:
    before = hashes(undisturbed["parquet"])
    monkeypatch.setattr("jobs.extraction.connect", lambda **_: pytest.fail("Ray was started"))
    said = run(videos, networks, undisturbed["parquet"], "--layout", "parquet", *more)
    assert ("of one CPU" if "--dry-run" in more else "nothing: 4 shards") in said
    assert hashes(undisturbed["parquet"]) == before


def test_a_dry_run_writes_nothing(videos: Path, networks: list[str], tmp_path: Path) -> None:
    assert "of one CPU" in run(videos, networks, tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()


def test_a_page_that_was_lost_is_drawn_again_by_its_job_and_by_report(
    undisturbed: dict[str, Path], videos: Path, networks: list[str]
) -> None:
    page = undisturbed["parquet"] / "report.html"
    drawn = page.read_bytes()
    assert b"6 of 10 videos have features" in drawn
    for again in (lambda: run(videos, networks, page.parent), lambda: report.make_report(str(page.parent))):
        page.unlink()
        again()
        assert page.read_bytes() == drawn


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--stride", "4"), "settings.features.stride: 8 there, 4 now"),
        (("--crops", "5"), "settings.features.crops: 1 there, 5 now"),
        (("--precision", "bf16"), "settings.precision: 'fp32' there, 'bf16' now"),
        (("--flow-preset", "fast"), "settings.flow_preset: 'faithful' there, 'fast' now"),
        (("--resize", "48"), "settings.decode.short_side: 40 there, 48 now"),
        (("--streams", "rgb"), "settings.weights.flow: "),
    ],
)
def test_other_settings_on_the_same_output_are_refused_by_name(
    undisturbed: dict[str, Path], videos: Path, networks: list[str], more: tuple[str, ...], named: str
) -> None:
    output = undisturbed["parquet"]
    before = hashes(output)
    done = run_here("extract_features", "--videos", videos, *networks, "--output", output, *FLAGS, *NO_GPUS, *more)
    assert done.returncode == 1
    assert named in done.stderr
    assert hashes(output) == before


def test_another_network_on_the_same_output_is_refused_by_its_weights(
    undisturbed: dict[str, Path], videos: Path, tmp_path: Path
) -> None:
    flags = save_networks(tmp_path, seed=1)
    given = ("--videos", videos, *flags, "--output", undisturbed["parquet"], *FLAGS, *NO_GPUS)
    done = run_here("extract_features", *given)
    assert done.returncode == 1
    assert "settings.weights.rgb: " in done.stderr


def test_a_video_added_later_is_refused_and_one_that_was_named_is_taken_in(
    ray_here: None, videos: Path, networks: list[str], tmp_path: Path
) -> None:
    """As in an extraction: the catalog that an output was begun with is part of its plan."""
    folder, output = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos / "train" / "left", folder)
    (video,) = folder.iterdir()
    (tmp_path / "list.csv").write_text(f"path,label\n{video.name},left\nlater.mp4,left\n")
    given = ("--annotations", tmp_path / "list.csv")
    run(folder, networks, output, *given)
    assert total(output, "missing") == 1
    shutil.copyfile(video, folder / "later.mp4")
    assert "nothing: 1 shard" in run(folder, networks, output, *given)
    run(folder, networks, output, *given, "--retry-quarantined")
    assert total(output, "ok") == 2
    with (tmp_path / "list.csv").open("a") as file:
        file.write("another.mp4,left\n")
    flags = ("--videos", folder, *networks, "--output", output, *FLAGS, *NO_GPUS, *given)
    assert "catalog.videos: 2 there, 3 now" in run_here("extract_features", *flags).stderr


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_that_refused_a_second_goes_on_to_the_bytes_of_an_undisturbed_one(
    undisturbed: dict[str, Path], videos: Path, networks: list[str], tmp_path: Path, how: signal.Signals
) -> None:
    """Its failures are not forgotten, either."""
    out = tmp_path / "out"
    flags = ("--videos", videos, *networks, "--output", out, *FLAGS)
    command = [sys.executable, JOB, *map(str, flags), "--num-cpus", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 200
    while not list((out / "commits").glob("*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run_here("extract_features", *flags, *NO_GPUS)
    assert (second.returncode, str(process.pid) in second.stderr) == (1, True)
    process.send_signal(how)
    printed, _ = process.communicate(timeout=200)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped; the same command goes on" in printed
    assert not (out / "features.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (out / "commits").glob("*.json")}
    run(videos, networks, out)
    assert hashes(out) == hashes(undisturbed["parquet"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_retry_takes_in_a_repaired_video_as_if_it_had_never_failed(
    videos: Path, networks: list[str], tmp_path: Path, layout: str
) -> None:
    """Stopped between its files and their record it loses nothing, though the sources are gone."""
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder, ignore=shutil.ignore_patterns("broken"))
    repaired = next(folder.rglob("up_0000.mp4"))
    good = repaired.read_bytes()
    Work(config_of(folder, networks, tmp_path / "undisturbed", layout=layout)).make_here()
    repaired.write_bytes(good[:100])
    work = Work(config_of(folder, networks, tmp_path / "out", layout=layout))
    work.make_here()
    assert total(tmp_path / "out", "quarantined") == 1
    repaired.write_bytes(good)
    for path in folder.rglob("*.mp4"):
        if path != repaired:
            path.unlink()
    shard = work.row("up_0000")["shard"]
    for lost in (*(["up_0000.npy"] if layout == "npy" else []), ".pending", f"{shard}.parquet", f"{shard}.json"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "put", failing(storage.put, lost))
            patch.setattr(storage.Draft, "put", failing(storage.Draft.put, lost))
            with pytest.raises(OSError, match="away"):
                work.make_here(retry=True)
    work.make_here(retry=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_a_retry_keeps_videos_of_many_row_groups(
    videos: Path, networks: list[str], tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "BLOCK_BYTES", 1)
    work = Work(config_of(videos, networks, tmp_path / "out", layout=layout))
    work.make_here()
    before = hashes(tmp_path / "out")
    files = [file for file in before if file.endswith(".parquet") and file.startswith(("features/", "windows/"))]
    groups = [pq.ParquetFile(tmp_path / "out" / file).metadata.num_row_groups for file in files]
    assert sum(groups) > (20 if layout == "parquet" else 5)
    work.make_here(retry=True)  # broken videos fail again, and the others are kept
    assert hashes(tmp_path / "out") == before


def failing(put: Callable[..., None], lost: str) -> Callable[..., None]:
    """A put that fails for a URI, or the draft of one, with `lost` in it."""

    def fail(target: Any, *data: bytes) -> None:
        if lost in getattr(target, "uri", target):
            raise OSError("the storage is away")
        put(target, *data)

    return fail


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_changed_is_kept_by_no_retry_and_made_again_by_verify(
    videos: Path, networks: list[str], tmp_path: Path, layout: str
) -> None:
    work = Work(config_of(videos, networks, tmp_path / "out", layout=layout))
    work.make_here()
    before = hashes(tmp_path / "out")
    broken = work.row("broken")["shard"]
    row = next(r for r in work.plan.table.to_pylist() if r["shard"] == broken and "broken" not in r["id"])
    name = f"{row['id']}.npy" if layout == "npy" else f"{broken}.parquet"
    path = tmp_path / "out" / "features" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"are not as they were committed.* --verify"):
        work.make_here(retry=True)
    for block in find_work(work.plan, verify=True):
        work.steps.make_shard(block)
    assert hashes(tmp_path / "out") == before


def test_arrays_that_an_interrupted_run_left_of_a_video_that_fails_now_are_removed(
    videos: Path, networks: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(videos / "train" / "up", folder)
    (video,) = folder.iterdir()
    work = Work(config_of(folder, networks, tmp_path / "out", layout="npy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "put", failing(storage.put, ".pending"))
        with pytest.raises(OSError, match="away"):
            work.make_here()
    assert list((tmp_path / "out" / "features").glob("*.npy"))
    video.write_bytes(b"no video")
    work.make_here()
    assert not list((tmp_path / "out" / "features").glob("*.npy"))
    assert total(tmp_path / "out", "quarantined") == 1


def test_an_outage_ends_the_run_and_costs_no_video(
    videos: Path, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transient error of the storage is met again by the next start, and leaves no trace then."""
    folder = tmp_path / "videos"
    shutil.copytree(videos / "train" / "up", folder)
    work = Work(config_of(folder, networks, tmp_path / "out"))

    def fail(uri: str) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "local_copy", fail)
        with pytest.raises(OutageError, match="could not be fetched"):
            work.make_here()
    assert not list(tmp_path.glob("out/commits/*"))
    work.make_here()
    assert total(tmp_path / "out", "ok") == 1
    row = work.row("up_0000")
    shutil.rmtree(folder)
    with pytest.raises(OutageError, match="videos"):
        work.steps.extract(dict(row))


def test_a_video_too_short_for_a_window_says_so(networks: list[str], tmp_path: Path) -> None:
    write_motion_videos(tmp_path / "videos", videos_per_class=1, seed=2, num_frames=12, size=(64, 48))
    work = Work(config_of(tmp_path / "videos", networks, tmp_path / "out", pad="drop"))
    done = work.steps.extract(dict(work.row("up_0000")))
    assert (done["status"], done["stage"], done["error_kind"]) == ("quarantined", "features", "too_short")
    assert "12 frames" in done["error_message"]


def test_a_stored_stream_of_fewer_frames_than_are_recorded_is_refused(
    videos: Path, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its windows would be of another length of video than those of the other stream."""
    task = Work(config_of(videos, networks, tmp_path)).source.task
    settings = codec.CodecSettings(flow_codec="jpeg")
    encoder = codec.FlowEncoder(settings, height=40, width=54, fps=25)
    for flow in np.zeros((19, 40, 54, 2), np.float32):
        encoder.write(flow)
    convention = SimpleNamespace(flow=settings.flow_convention())
    row = {"rgb": b"", "flow": encoder.close(), "convention": convention}
    monkeypatch.setattr(frames_module, "_read_stored", lambda *_: row)
    stored_task = dataclasses.replace(task, data=("data", "fingerprint"))
    for recorded in (20, 21, 100):
        stored = StoredVideo({"num_frames": recorded}, stored_task)
        if recorded == 20:
            assert [len(batch) for batch in stored.read("flow")] == [19]
        else:
            with pytest.raises(VideoError, match=f"flow ends after 19 of {recorded - 1} frames"):
                list(stored.read("flow"))


def test_weights_that_are_replaced_under_a_run_end_it(videos: Path, tmp_path: Path) -> None:
    flags = save_networks(tmp_path)
    work = Work(config_of(videos, flags, tmp_path / "out"))
    save_networks(tmp_path, seed=1)
    with pytest.raises(RunError, match="other weights than when this run was planned"):
        work.steps.extract(dict(work.row("up_0000")))


def test_networks_named_by_relative_paths_are_found_by_workers_that_stand_elsewhere(
    networks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(networks[1]).parent
    monkeypatch.chdir(folder)
    config = ExtractFeatures(videos="videos", output="out", rgb="rgb", flow="./flow")
    assert config.uris == {"rgb": str(folder / "rgb"), "flow": str(folder / "flow")}
    assert config.given == {"rgb": "rgb", "flow": "./flow"}


def test_tensorfloat_is_decided_where_all_jobs_have_it_decided(
    videos: Path, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(
        cuda, "set_up", lambda device, precision, *, training: asked.append((device.type, precision, training))
    )
    Work(config_of(videos, networks, tmp_path)).source.task.load(torch.device("cpu"))
    assert set(asked) == {("cpu", "fp32", False)}


@pytest.mark.parametrize(
    ("status", "flags", "words"),
    [
        (2, ("--rgb", "r"), ("--videos or --data",)),
        (2, ("--videos", "v", "--data", "d", "--rgb", "r"), ("--videos or --data",)),
        (2, ("--videos", "v"), ("no network is given",)),
        (2, ("--data", "d", "--rgb", "r", "--limit", "3"), ("--limit", "not with --data")),
        (2, ("--data", "d", "--rgb", "r", "--flow-preset", "fast"), ("--flow-preset", "go with --videos")),
        (2, ("--data", "d", "--rgb", "r", "--max-frames", "9"), ("limits of decoding", "go with --videos")),
        (2, ("--videos", "v", "--rgb", "r", "--videos-per-shard", "0"), ("--videos-per-shard is 0",)),
        (2, ("--videos", "v", "--rgb", "r", "--max-frames", "0"), ("--max-frames is 0",)),
        (2, ("--videos", "v", "--rgb", "r", "--stride", "0"), ("--stride is 0",)),
        (2, ("--videos", "v", "--rgb", "r", "--streams", "flow"), ("--flow must name a network",)),
        (1, ("--videos", "v", "--rgb", "nothing"), ("--rgb", "nothing")),
    ],
)
def test_a_wrong_flag_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("extract_features", *flags, "--output", "out")
    text = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == status, text
    assert all(word in text for word in words), text
    assert not list(tmp_path.iterdir())


def test_a_preset_sets_flags_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ExtractFeatures] = []
    monkeypatch.setattr(extract_features, "run", seen.append)
    given = ("--videos", "v", "--rgb", "r", "--output", "o")
    succeed("extract_features", *given, "--preset", "thumos14-25fps", "--stride", "8")
    (config,) = seen
    settings = config.settings
    assert (config.preset, settings.window, settings.stride, settings.layout) == (
        "thumos14-25fps",
        16,
        8,
        "npy-streams",
    )


def test_features_of_shards(ray_here: None, motion_shards: str, networks: list[str], tmp_path: Path) -> None:
    """Frames and flow are read as they are stored; what is in no shard is missing."""
    flags = ("--data", motion_shards, *networks, *FLAGS, *NO_GPUS, "--layout", "npy-streams")
    succeed("extract_features", *flags, "--output", tmp_path / "out")
    found = read_features(str(tmp_path / "out"))
    assert {name: (counts.ok, counts.missing) for name, counts in found.splits.items()} == {
        "train": (12, 0),
        "test": (6, 2),
    }
    name = "test~up~up_0002"
    arrays = {stream: np.load(tmp_path / "out" / "features" / stream / f"{name}.npy") for stream in ("rgb", "flow")}
    assert {stream: array.shape for stream, array in arrays.items()} == {"rgb": (2, 128), "flow": (2, 128)}
    videos = Path(motion_shards).parent / "videos"
    work = Work(config_of(videos, networks, tmp_path / "raw", layout="npy-streams"))
    row = work.steps.extract(dict(work.row("up_0002")))
    for stream, array in arrays.items():
        raw = row["vectors"][stream][:]
        assert np.abs(raw - array).max() < 0.1 * np.abs(raw).max()  # but for the codecs
    assert not np.array_equal(arrays["rgb"], arrays["flow"])
    again = succeed("extract_features", *flags, "--output", tmp_path / "out")
    assert "nothing: 7 shards" in again
    done = run_here("extract_features", *flags, "--fps", "12.5", "--output", tmp_path / "other")
    assert "--fps is 12.5" in done.stderr
    succeed("extract_features", *flags, "--output", tmp_path / "test", "--split", "test")
    assert (tmp_path / "test" / "features" / "flow" / f"{name}.npy").read_bytes() == (
        tmp_path / "out" / "features" / "flow" / f"{name}.npy"
    ).read_bytes()


def test_a_data_set_that_is_away_ends_a_run_over_shards(
    motion_shards: str, networks: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(motion_shards, copy)
    config = config_of(Path("unused"), networks, tmp_path / "out")
    work = Work(dataclasses.replace(config, videos=None, data=str(copy)))
    row = work.row("up_0000")
    kept = Path(row["file"]).rename(tmp_path / "kept")
    assert work.steps.extract(dict(row))["error_kind"] == "unreadable"
    kept.rename(row["file"])
    assert work.steps.extract(dict(row))["status"] == "ok"
    copy.rename(tmp_path / "away")
    with pytest.raises(OutageError, match="cannot be read"):
        work.steps.extract(dict(row))


GPUS = Placement(flow_actors=2, gpus_per_actor=0.5)


@pytest.mark.parametrize(
    "streams", [("rgb", "flow"), *(pytest.param((stream,), marks=pytest.mark.soak) for stream in ("rgb", "flow"))]
)
def test_actors_on_gpus_make_the_bytes_of_tasks(
    ray_cluster: None, videos: Path, networks: list[str], tmp_path: Path, streams: tuple[Any, ...]
) -> None:
    Work(config_of(videos, networks, tmp_path / "tasks", streams=streams)).make_here()
    work = Work(config_of(videos, networks, tmp_path / "actors", streams=streams))
    work.run(GPUS)
    assert hashes(tmp_path / "actors") == hashes(tmp_path / "tasks")


def test_actors_read_shards_too(ray_cluster: None, motion_shards: str, networks: list[str], tmp_path: Path) -> None:
    made = {}
    for name in ("tasks", "actors"):
        config = dataclasses.replace(config_of(Path("v"), networks, tmp_path / name), videos=None, data=motion_shards)
        work = Work(dataclasses.replace(config, split="test"))
        if name == "actors":
            work.run(GPUS)
        else:
            work.make_here()
        made[name] = hashes(tmp_path / name)
    assert made["actors"] == made["tasks"]


class MortalActor(FeatureActor):
    """An actor that is killed in the second batch of a video: the first time, or every time."""

    mark = ""
    once = True

    def push(self, key: str, number: int, source: Any, frames: Any) -> Any:
        if number == 1 and not (self.once and Path(self.mark).exists()):
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().push(key, number, source, frames)


@pytest.fixture
def mortal(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[MortalActor]:
    """In place of the actor; batches are of eight frames."""
    monkeypatch.setattr(MortalActor, "mark", str(tmp_path / "died"))
    monkeypatch.setattr(pool_module, "FeatureActor", MortalActor)
    return MortalActor


class SmallBatches(FeatureSteps):
    """Steps whose batches are of eight frames."""

    def make_shard(self, batch: Any) -> Any:
        pool_module.MOST_FRAMES = 8
        return super().make_shard(batch)


def make_with_actors(work: Work, *, num_actors: int = 1) -> None:
    placement = Placement(flow_actors=num_actors)
    with start_pool(work.plan.task, "cpu", placement) as pool:
        steps = dataclasses.replace(work.steps, pool=pool)
        list(run_graph(find_work(work.plan), steps, placement))
    finish(work.plan, assemble(work.plan, work.source.describe(work.kernel)))


def test_a_video_whose_actor_dies_is_begun_again(
    mortal: type[MortalActor], videos: Path, networks: list[str], tmp_path: Path
) -> None:
    Work(config_of(videos, networks, tmp_path / "tasks")).make_here()
    make_with_actors(Work(config_of(videos, networks, tmp_path / "out"), SmallBatches))
    assert Path(mortal.mark).exists()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "tasks")


def test_a_video_that_always_kills_its_actor_ends_the_run_in_a_sentence(
    mortal: type[MortalActor], videos: Path, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mortal, "once", False)
    work = Work(config_of(videos, networks, tmp_path / "out"), FewDeaths)
    with pytest.raises(FlowLostError, match="2 GPU actors died while they had the same video"):
        make_with_actors(work)
    assert not list((tmp_path / "out" / "commits").glob("*.json"))


class FewDeaths(SmallBatches):
    """The same, whose videos may lose one actor."""

    def make_shard(self, batch: Any) -> Any:
        flow_pool.MAX_DEATHS = 1
        return super().make_shard(batch)


class BadActor(FeatureActor):
    """An actor whose GPU computes wrong numbers."""

    def __init__(self, work: Any) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise cuda.ConvolutionError("conv3d in fp32 is off by 0.4")

        cuda.set_up = refuse
        super().__init__(work)


def test_a_gpu_that_computes_wrong_ends_the_run_in_a_sentence(
    ray_cluster: None, videos: Path, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "FeatureActor", BadActor)
    task = Work(config_of(videos, networks, tmp_path)).source.task
    with start_pool(task, "cpu", GPUS) as pool:
        assert pool is not None
        with pytest.raises(RunError, match=r"^conv3d in fp32 is off by 0.4$"):
            pool.kernel()


def test_a_session_that_an_actor_does_not_know_is_lost(videos: Path, networks: list[str], tmp_path: Path) -> None:
    actor = FeatureActor((Work(config_of(videos, networks, tmp_path)).source.task, "cpu"))
    frames = np.zeros((3, 40, 54, 3), np.uint8)
    actor.push("a", 0, "video", frames)
    actor.push("a", 1, "video", frames)
    for key, number in (("a", 3), ("b", 1)):
        with pytest.raises(SessionLostError):
            actor.push(key, number, "video", frames)
    features, kernel = actor.finish("a", 2)
    assert {stream: array.shape for stream, array in features.items()} == {"rgb": (1, 128), "flow": (1, 128)}
    taken = actor.push("c", 0, "video", np.zeros((16 + 8 + 1, 40, 54, 3), np.uint8))
    assert {stream: len(array) for stream, array in taken.items()} == {"rgb": 2, "flow": 1}  # the last frame waits
    assert kernel == tvl1.kernel_target("cpu")
    with pytest.raises(SessionLostError):
        actor.finish("a", 2)
    assert actor.busy() > 0


class Here:
    """A method of an actor that is called in this process, as Ray's are."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def options(self, **_: object) -> Here:
        return self

    def remote(self, *args: Any) -> Any:
        return self.method(*args)


@pytest.fixture
def actor_here(
    videos: Path, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[FeatureActor, pool_module.FeaturePool]:
    """An actor of this process, and the pool that it is alone in."""
    actor = FeatureActor((Work(config_of(videos, networks, tmp_path)).source.task, "cpu"))
    methods = {name: Here(getattr(actor, name)) for name in ("push", "finish", "drop")}
    pool = pool_module.FeaturePool([])
    monkeypatch.setattr(pool, "pick", lambda: SimpleNamespace(**methods))
    monkeypatch.setattr(pool_module, "receive", lambda answer: answer)
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "wait", lambda answers: (answers, []))
    return actor, pool


def test_an_actor_holds_nothing_of_a_video_that_fails_on_the_way(
    actor_here: tuple[FeatureActor, pool_module.FeaturePool],
) -> None:
    """A few hundred corrupt videos would else fill the GPU, whose windows wait for a whole batch."""
    actor, pool = actor_here
    frames = np.zeros((3, 40, 54, 3), np.uint8)

    def open_corrupt() -> Any:
        yield "video", frames
        yield "video", frames
        raise VideoError("corrupt", "most of its frames are lost")

    with pytest.raises(VideoError, match="most of its frames are lost"):
        pool.compute(open_corrupt)
    assert not actor.sessions
    spool, _ = pool.compute(lambda: iter([("video", frames)]))
    assert spool.vectors["rgb"].shape == (1, 128)
    assert not actor.sessions


def test_an_actor_begins_many_videos_at_a_time(actor_here: tuple[FeatureActor, pool_module.FeaturePool]) -> None:
    """Its calls run in threads, which all open sessions and look for those that are left."""
    actor, _ = actor_here
    failures: list[BaseException] = []

    def begin_and_drop(name: str) -> None:
        try:
            for number in range(2000):
                actor._find(f"{name} {number}", 0)
                actor.drop(f"{name} {number - 40}")
        except RuntimeError as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=begin_and_drop, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


def test_the_job_computes_on_the_gpus_that_are_there(ray_here: None, videos: Path, networks: list[str]) -> None:
    from jobs.extraction import place

    config = config_of(videos, networks, Path("nowhere"))
    assert place(config, "nowhere", lambda: 2.0) == ("torch", Placement(flow_actors=2))
    assert place(dataclasses.replace(config, num_gpus=0), "nowhere", lambda: 2.0)[0] == "cpu"
    assert place(config, "nowhere", lambda: 0.0)[0] == "cpu"
    with pytest.raises(SettingsError, match=r"leave no actor: .*, or take --num-gpus 0 for another --output$"):
        place(dataclasses.replace(config, num_gpus=0.5), "nowhere", lambda: 2.0)
