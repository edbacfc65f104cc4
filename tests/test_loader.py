"""The numbered clips: arithmetic, decoding by number, and what Ray Data streams."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

import models
from pipelines.clips import numbered
from pipelines.clips.augmentation import Augmentation
from pipelines.clips.loader import Batch, begin, stream_batches
from pipelines.clips.numbered import TrainingClips, ValidationClips, WorkerPart, cut_clips, stack_clips
from pipelines.clips.sampling import ClipSettings, EvaluationProtocol
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import OutageError
from pipelines.media.codec import Area, decode_rgb_frames

CONTRACT = models.input_spec_of(models.configure("two_stream", num_classes=6, width=0.125, size=32))


@pytest.fixture
def clips(motion_shards: str) -> TrainingClips:
    videos = read_index(motion_shards).of_split("train").usable()
    augmentation = Augmentation(jitter=0.2)
    return TrainingClips(videos=videos, input_spec=CONTRACT, settings=ClipSettings(), augmentation=augmentation, seed=3)


@pytest.mark.parametrize(("num_workers", "batch"), [(1, 8), (2, 4), (3, 5)])
def test_workers_share_each_step_without_gap_or_overlap(num_workers: int, batch: int) -> None:
    parts = [
        WorkerPart(start=7, rank=rank, num_workers=num_workers, batch=batch, steps=6) for rank in range(num_workers)
    ]
    for step in range(6):
        numbers = [number for part in parts for number in part.numbers(step * batch, batch)]
        first = 7 + step * num_workers * batch
        assert numbers == list(range(first, first + num_workers * batch))
    assert all(part.numbers(6 * batch, 9) == [] for part in parts)


def test_the_rest_of_a_share_goes_on_where_it_was_left() -> None:
    part = WorkerPart(start=0, rank=1, num_workers=2, batch=4, steps=10)
    assert part.after(4, 6).numbers(0, 100) == part.numbers(16, 100)


def test_every_epoch_shows_each_video_once_in_another_order(clips: TrainingClips) -> None:
    epochs = [[clips.video_of(12 * epoch + place) for place in range(12)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [clips.video_of(number) for number in range(12)]
    assert epochs[0] != [replace(clips, seed=4).video_of(number) for number in range(12)]


def test_a_clip_is_known_by_its_number(clips: TrainingClips) -> None:
    first, again, later = clips.cut(5), clips.cut(5), clips.cut(17)
    assert first["weight"] == 1
    assert first["error"] == ""
    assert first["label"] == clips.videos.row(clips.video_of(5))["label"]
    assert (first["rgb"].shape, first["flow"].shape) == ((1, 32, 32, 3), (10, 32, 32, 2))
    np.testing.assert_array_equal(first["rgb"], again["rgb"])
    np.testing.assert_array_equal(first["flow"], again["flow"])
    assert (first["rgb"] != later["rgb"]).any()


def test_clips_of_one_window_are_decoded_once_and_cropped_apart(
    clips: TrainingClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def decode(data: bytes, frames: list[int], *rest: Any, **words: Any) -> Any:
        decoded.append(frames)
        return decode_rgb_frames(data, frames, *rest, **words)

    monkeypatch.setattr(numbered, "decode_rgb_frames", decode)
    repeated = replace(clips, augmentation=replace(clips.augmentation, repeats=3))
    assert repeated.clips_per_task(8) % 3 == 0
    assert [repeated.video_of(number) for number in range(0, 36, 3)] == [clips.video_of(n) for n in range(12)]
    columns = cut_clips(repeated, range(2, 8))  # the last of the first window, the second, two of the third
    assert len(decoded) == 3
    assert len({row.tobytes() for row in columns["rgb"]}) == len({row.tobytes() for row in columns["flow"]}) == 6
    for row, number in enumerate(range(2, 8)):
        alone = repeated.cut(number)  # as by a task of its own
        assert alone["label"] == columns["label"][row]
        np.testing.assert_array_equal(alone["rgb"], columns["rgb"][row])
        np.testing.assert_array_equal(alone["flow"], columns["flow"][row])
    starts = decoded[3:]
    assert starts[1] == starts[2] == starts[3]
    assert decoded[1] == starts[1]


def test_a_task_cuts_whole_batches_or_an_even_part_of_one(
    clips: TrainingClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clips.clips_per_task(6) == 60
    clip_bytes = sum(clip.nbytes for clip in clips.empty().values())
    monkeypatch.setattr(numbered, "TASK_BYTES", 5 * clip_bytes)
    assert [clips.clips_per_task(batch) for batch in (2, 5, 6, 7, 16)] == [4, 5, 3, 1, 4]
    monkeypatch.setattr(numbered, "TASK_BYTES", 1)
    assert clips.clips_per_task(6) == 1


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("in_codes", [False, True])
@pytest.mark.parametrize("stream", ["rgb", "flow"])
def test_a_part_of_a_decoded_window_is_that_part_decoded(
    clips: TrainingClips, stream: str, in_codes: bool, mirrored: bool
) -> None:
    row = numbered.read_stored(clips.videos.row(0), ["rgb", "flow"])
    for area in (Area(top=3, left=5, height=32, width=30), None):
        found, expected = (
            read(row, stream, [2, 3, 5], area, mirrored=mirrored, in_codes=in_codes)
            for read in (numbered._Window().read_frames, numbered._read_frames)
        )
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def with_broken(videos: VideoIndex, place: int) -> VideoIndex:
    """The index with one video's shard gone."""
    files = videos.table["file"].to_pylist()
    files[place] = files[place].replace("train-", "gone-")
    column = videos.table.schema.get_field_index("file")
    return replace(videos, table=videos.table.set_column(column, "file", pa.array(files)))


def test_a_clip_that_cannot_be_decoded_is_told_and_replaced(clips: TrainingClips) -> None:
    broken = replace(clips, videos=with_broken(clips.videos, clips.video_of(1)))
    columns = cut_clips(broken, range(4))
    assert columns["weight"].tolist() == [1, 0, 1, 1]
    assert "FileNotFoundError" in columns["error"][1]
    assert columns["error"].tolist()[0] == ""
    np.testing.assert_array_equal(columns["rgb"][1], columns["rgb"][0])
    assert len(columns["flow"]) == 4


def test_storage_that_is_away_is_no_broken_video(clips: TrainingClips, tmp_path: Path) -> None:
    """The folder of the data set is gone, as a mount or a bucket may be."""
    files = [file.replace(clips.videos.data, str(tmp_path / "away")) for file in clips.videos.table["file"].to_pylist()]
    column = clips.videos.table.schema.get_field_index("file")
    table = clips.videos.table.set_column(column, "file", pa.array(files))
    away = replace(clips, videos=replace(clips.videos, data=str(tmp_path / "away"), table=table))
    with pytest.raises(OutageError, match=r"away cannot be read: .*No such file"):
        away.cut(0)


def test_an_outage_of_a_moment_costs_nothing(clips: TrainingClips, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, read_stored = iter([OSError("the server does not answer")]), numbered.read_stored

    def read_late(*given: Any) -> Any:
        if error := next(failures, None):
            raise error
        return read_stored(*given)

    monkeypatch.setattr(numbered, "read_stored", read_late)
    assert clips.cut(5)["weight"] == 1
    assert next(failures, None) is None


def test_a_batch_of_nothing_but_failures_still_has_shapes(clips: TrainingClips) -> None:
    failed = {"number": 0, "label": 1, "weight": 0.0, "error": "no"}
    assert stack_clips([failed, failed], clips.empty())["rgb"].shape == (2, 1, 32, 32, 3)


def test_batches_become_what_the_model_takes() -> None:
    rgb = torch.full((2, 1, 32, 32, 3), 255, dtype=torch.uint8)
    flow = torch.full((2, 10, 32, 32, 2), -3.0, dtype=torch.float16)
    batch = Batch(
        streams={"rgb": rgb, "flow": flow}, labels=torch.zeros(2), weights=torch.ones(2), errors=(), numbers=(0, 1)
    )
    inputs = batch.inputs(torch.device("cpu"), bound=4)
    assert inputs["rgb"].shape == (2, 3, 1, 32, 32)
    assert inputs["flow"].shape == (2, 2, 10, 32, 32)
    assert (inputs["rgb"] == 1).all()
    assert (inputs["flow"] == -0.75).all()
    assert inputs["flow"].is_contiguous(memory_format=torch.channels_last_3d)


def test_validation_clips_are_the_protocols_and_fill_up_with_nothing(motion_shards: str) -> None:
    videos = read_index(motion_shards).of_split("test").usable()
    protocol = EvaluationProtocol(num_clips=2, flip=True)
    clips = ValidationClips(videos=videos, input_spec=CONTRACT, settings=ClipSettings(), protocol=protocol)
    cut = clips.cut(0)
    assert cut["rgb"].shape == clips.empty()["rgb"].shape == (4, 1, 32, 32, 3)
    assert clips.cut(len(videos))["weight"] == 0
    assert clips.cut(len(videos))["error"] == ""


@pytest.fixture
def a_quarter_left(ray_here: None) -> Iterator[None]:
    """Of the CPUs of the Ray that is up a quarter is left."""
    reserved = ray.remote(num_cpus=2.75)(type("Worker", (), {})).remote()
    ray.get(reserved.__ray_ready__.remote())
    yield
    ray.kill(reserved)


@pytest.mark.parametrize(("rank", "num_cpus"), [(0, 0.25), (1, 0)])
def test_ray_data_streams_the_clips_of_each_worker_in_order_on_the_cpus_that_are_left(
    a_quarter_left: None, clips: TrainingClips, rank: int, num_cpus: float
) -> None:
    part = WorkerPart(start=40, rank=rank, num_workers=2, batch=5, steps=30)
    batches = list(stream_batches(clips, part, num_cpus=num_cpus))
    assert [number for batch in batches for number in batch.numbers] == part.numbers(0, 1000)
    assert len(batches) == 30
    assert not any(batch.errors for batch in batches)
    for place, number in enumerate(batches[7].numbers):
        cut = clips.cut(number)
        assert all((batches[7].streams[name][place].numpy() == cut[name]).all() for name in ("rgb", "flow"))


def test_an_outage_in_a_task_of_ray_data_is_the_error(ray_here: None, clips: TrainingClips) -> None:
    table = clips.videos.table
    files = pa.array([file.replace(clips.videos.data, "/nowhere") for file in table["file"].to_pylist()])
    table = table.set_column(table.schema.get_field_index("file"), "file", files)
    away = replace(clips, videos=replace(clips.videos, data="/nowhere", table=table))
    part = WorkerPart(start=40, rank=1, num_workers=2, batch=5, steps=30)
    with pytest.raises(OutageError, match=r"^/nowhere cannot be read: \[Errno 2\]"):
        next(stream_batches(away, part, num_cpus=0))


@pytest.mark.parametrize("module", ["pipelines.clips.source", "pipelines.training.ray_train"])
def test_what_cuts_clips_and_ray_train_s_controller_import_no_torch(module: str) -> None:
    """Each of these processes would take two seconds and 200 MB more."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parents[1])


def test_the_first_batch_is_made_before_it_is_asked_for() -> None:
    made = threading.Event()

    def make(*batches: str) -> Iterator[Any]:
        made.set()
        yield from batches
        raise OutageError("the store is away")

    batches = begin(make("first", "second"))
    assert made.wait(timeout=60)
    assert [next(batches), next(batches)] == ["first", "second"]
    with pytest.raises(OutageError, match="away"):
        next(batches)
    assert list(begin(iter(()))) == []
    with pytest.raises(OutageError, match="away"):
        next(begin(make()))
