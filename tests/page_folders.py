"""Small folders of each kind that a page is made of: an extraction, features, a training, an evaluation, a search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

import models
from models import checkpoint
from pipelines import records, storage
from pipelines.datasets import shards
from pipelines.datasets.records import Dataset, ListedShard, ShardConvention, SplitCounts, StoredFlowError, Totals
from pipelines.datasets.shards import ShardSettings
from pipelines.datasets.video_index import read_index
from pipelines.evaluation import scoring
from pipelines.extraction.plan import ExtractionSettings
from pipelines.features.presets import PRESETS
from pipelines.features.records import VIDEO_SCHEMA, FeatureCommit, FeatureCounts, FeatureSet, describe
from pipelines.media.codec import CodecSettings, FlowEncoder, RGBEncoder
from pipelines.pages import extraction
from pipelines.pages.class_coverage import Count
from pipelines.search.records import State, Trial, TrialReport
from pipelines.search.results import conclude, write_outcome
from pipelines.search.space import Geometry, Space, identify, model_settings
from pipelines.search.trials import Book, Search
from pipelines.training.config import Scale

CODEC = CodecSettings(flow_codec="h264")
CONVENTION = ShardConvention(
    flow=CODEC.flow_convention(), rgb={"codec": "h264"}, members={"rgb": "rgb.mp4", "flow": "flow.mp4"}
)


def make_video(
    name: str, *, class_name: str = "wave", split: str = "train", speed: float = 2.0, size: int = 32
) -> dict:
    """A row of a shard: 6 frames of a grey ramp that moves to the right at `speed` px a frame."""
    rgb, flow = RGBEncoder(CODEC, height=size, width=size), FlowEncoder(CODEC, height=size, width=size)
    for _ in range(6):
        rgb.write(np.full((size, size, 3), (200, 60, 20), np.uint8))
    for _ in range(5):
        flow.write(np.broadcast_to(np.float32([speed, 0]), (size, size, 2)))
    facts = {"id": name, "class_name": class_name, "split": split, "label": 0, "source": f"{name}.mp4"}
    facts |= {"fps": 25.0, "source_fps": 25.0}
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


def write_dataset(folder: Path | str, videos: list[dict], *, format: str = "parquet") -> Dataset:
    """Shards, tables and what goes into dataset.json, one shard a split."""
    output, settings = str(folder), ShardSettings(format=format)
    for split in dict.fromkeys(video["split"] for video in videos):
        planned = [video | {"shard": f"{split}-00000"} for video in videos if video["split"] == split]
        shards.commit_shard(
            output, f"{split}-00000", planned, settings=settings, convention=CONVENTION, fingerprint="f00d"
        )
    commits = list(shards.write_tables(output, shards.read_commits(output)))
    return summarise(videos, commits, settings)


def summarise(videos: list[dict], commits: list[shards.Commit], settings: ShardSettings) -> Dataset:
    usable = [video for video in videos if video["status"] == "ok"]
    kinds = [video["error_kind"] for video in videos if video["status"] == "quarantined"]
    splits = {}
    for commit in commits:
        states = [video["status"] for video in commit.videos]
        splits[commit.split] = SplitCounts(
            expected=len(states), **{name: states.count(name) for name in asdict(Count())}
        )
    error = StoredFlowError(videos=len(usable), mean=0.01, rms=0.02, p999=0.1, max=0.3)
    return Dataset(
        fingerprint="f00d",
        settings={**asdict(ExtractionSettings(shards=settings)), "kernel": "numba:test"},
        convention=CONVENTION,
        classes=tuple(sorted({video["class_name"] for video in videos})),
        splits=splits,
        totals=Totals(
            frames=sum(video["num_frames"] for video in usable),
            flow_frames=sum(video["num_frames"] - 1 for video in usable),
            rgb_bytes=sum(video["rgb_bytes"] for video in usable),
            flow_bytes=sum(video["flow_bytes"] for video in usable),
        ),
        quarantine_reasons={kind: kinds.count(kind) for kind in kinds},
        flow_error_px=error if usable else None,
        shards=tuple(
            ListedShard(file=c.file, split=c.split, rows=c.num_rows, bytes=c.num_bytes, sha256=str(c.sha256))
            for c in commits
            if c.file
        ),
    )


def write_run(folder: Path, started: str, timeline: list[list[float]]) -> None:
    run = {"started": started, "host": "node-7", "seconds": timeline[-1][0], "timeline": timeline}
    run |= {"placement": {"num_cpus": 2}, "versions": {"ray": "2.60.0"}}
    storage.put(str(folder / "runs" / f"{started}.json"), json.dumps(run).encode())


def make_page(folder: Path, videos: list[dict], **settings: str) -> str:
    return Path(extraction.write_extraction_report(str(folder), write_dataset(folder, videos, **settings))).read_text()


def make_extraction(folder: Path, videos: list[dict]) -> Path:
    """A finished data set of these videos, with the record of a run."""
    write_run(folder, "2026-11-23T10:00:00+00:00", [[0, 0, 0, 0], [10, 3, 18, 1], [20, 5, 30, 1]])
    records.write(str(folder / "dataset.json"), write_dataset(folder, videos))
    return folder


def make_training(folder: Path, *, finished: bool = True) -> Path:
    """A run's folder with twenty logged steps and a flow I3D of 8 first filters."""
    config = models.configure("i3d", num_classes=3, stream="flow", width=0.125, size=32, frames=16)
    run = {"model": {"name": "i3d", "stream": "flow"}, "data": "<b>data</b>"}
    run |= {"train_videos": 12, "validation_videos": 6}
    train = {"clips": 8, "epoch": 1.0, "learning_rate": 0.1, "top1": 0.5, "clips_per_s": 9.5, "wait_share": 0.01}
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": 2 / step, **train, "failed": int(step == 3)} for step in range(1, 20)
    ]
    lines[2]["errors"] = ["train~x: FileNotFoundError: gone"]
    lines += [{"kind": "validation", "step": step, "val_loss": 1.0, "val_top1": 0.4} for step in (10, 19)]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        for seed, name in enumerate(("initial", "last")):
            torch.manual_seed(seed)
            checkpoint.save(folder / name, models.build_from(config), checkpoint.Metadata(classes=("a", "b", "c")))
        metrics = {"step": 19, "val_top1": 0.4}
        (folder / "result.json").write_text(json.dumps({"last": "last", "best": "last", "metrics": metrics}))
    return folder


def make_features(folder: Path, videos: list[dict]) -> Path:
    """A finished output of features of these videos by a preset, with the record of a run."""
    preset = PRESETS["thumos14"]
    write_run(folder, "2026-11-23T10:00:00+00:00", [[0, 0, 0, 0], [10, 3, 18, 1], [20, 5, 30, 1]])
    rows = [video | {"shard": "train-00000", "windows": 3 if video["status"] == "ok" else None} for video in videos]
    commit = FeatureCommit(
        shard="train-00000", split="train", files=(), fingerprint="f00d", videos=[describe(row) for row in rows]
    )
    list(shards.write_tables(str(folder), [commit], VIDEO_SCHEMA))
    kinds = [row["error_kind"] for row in rows if row["status"] == "quarantined"]
    splits = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        states = [row["status"] for row in rows if row["split"] == split]
        counts = {name: states.count(name) for name in asdict(Count())}
        splits[split] = FeatureCounts(expected=len(states), frames=6 * counts["ok"], windows=3 * counts["ok"], **counts)
    network = {"weights": "rgb.pt", "weights_sha256": "beef", "channels": 1024, "crop_px": 224, "input": "RGB"}
    described = {"name": "thumos14", "source": preset.source, "convention": preset.convention}
    described |= {"differs": ["frames are decoded by another library"], "unknown": preset.unknown}
    found = FeatureSet(
        fingerprint="f00d",
        preset=described | {"overridden": {"stride": 4}},
        settings=asdict(replace(preset.settings, stride=8)),
        windows={"frames": 16, "stride": 8, "ends": "left out"},
        networks={"rgb": network, "flow": network | {"weights": "s3://bucket/flow", "input": "flow"}},
        precision="fp32",
        decoding={"fps": "native", "frame_size": "340x256"},
        flow={"bound": 20.0, "kernel": "numba:test"},
        splits=splits,
        quarantine_reasons={kind: kinds.count(kind) for kind in kinds},
        shards=("train-00000",),
        bytes=49152,
    )
    records.write(str(folder / "features.json"), found)
    return folder


def make_evaluation(folder: Path, classes: Sequence[str]) -> Path:
    """An evaluation of RGB and flow, four videos a class: of each third class flow takes all for the next class."""
    base = make_video("", split="test")
    videos = [
        base | {"id": f"{label}~{number}", "label": label, "class_name": name}
        for label, name in enumerate(classes)
        for number in range(4)
    ]
    dataset = write_dataset(folder / "shards", videos)
    settings = {**dataset.settings, "decode": {"fps": 25.0, "short_side": 32}}
    dataset = replace(dataset, classes=tuple(classes), settings=settings)
    records.write(str(folder / "shards" / "dataset.json"), dataset)
    index = read_index(str(folder / "shards"))
    rows = [_score(index.row(place)["label"], place, len(classes)) for place in range(len(index))]
    table = scoring.tabulate(index, index, rows, ["rgb", "flow"])
    settings = {"data": index.data, "split": "test"}
    evaluation = scoring.summarise(table, ["rgb", "flow"], index.classes, ignore_missing=False, settings=settings)
    output = folder / "evaluation"
    output.mkdir()
    pq.write_table(table, output / "scores.parquet")
    records.write(str(output / "evaluation.json"), evaluation)
    return output


def _score(label: int, place: int, num_classes: int) -> dict[str, Any]:
    rgb, flow = np.zeros(num_classes), np.zeros(num_classes)
    rgb[label] = 2
    flow[(label + (label % 3 == 0)) % num_classes] = 3
    return {"place": place, "error": "", "logits_rgb": rgb.tolist(), "logits_flow": flow.tolist()}


SPACE = Space(paper_frames=16, frames=(8,))
SEARCH = Search(space=SPACE, num_trials=12, steps=90, first_rung=10, scale=Scale(num_workers=1, data_cpus=0.5))
PAPER = identify(SPACE.paper())


def report_of(step: int, score: float, loss: float = 1.0) -> TrialReport:
    """What a trial reports."""
    return TrialReport(step=step, clips=8 * step, val_top1=score, val_loss=loss, seconds=1.0)


def make_trial(number: int, curve: list[TrialReport], state: State = "finished", gflops: float = 1.0) -> Trial:
    """A trial, number 0 of the paper's geometry."""
    chosen = {"conv1_kernel": 3 + 2 * (number % 3), "frame_step": (1, 2, 4)[number // 3 % 3]}
    geometry = SPACE.paper() | ({"pool_2a_kernel": 2, **chosen} if number else {})
    facts = {"id": identify(geometry), "number": number, "geometry": geometry, "gflops": gflops}
    return Trial(**facts, state=state, seconds=60, curve=tuple(curve))


def make_book(folder: Path) -> Book:
    """Four finished trials, a stopped and a failed one."""
    book = Book(str(folder), PAPER)
    for number, (score, gflops) in enumerate([(0.6, 4.0), (0.8, 6.0), (0.5, 2.0), (0.7, 8.0)]):
        book.save(make_trial(number, [report_of(10, 0.3), report_of(90, score)], gflops=gflops))
    book.save(make_trial(4, [report_of(10, 0.9)], "stopped", gflops=1.0))
    book.save(make_trial(5, [], "failed", gflops=1.0))
    return book


def make_search(folder: Path, *, book: Book | None = None) -> Path:
    """A finished search of the trials of a book."""
    book = book or make_book(folder)
    outcome = conclude(book, SEARCH, num_best=2)
    assert outcome is not None
    write_outcome(book, outcome, _prepare)
    settings = {"choices": {}, "steps": 90, "first_rung": 10, "reduction": 3, "objective": "accuracy"}
    (folder / "sweep.json").write_text(json.dumps({"run": {"model": {"stream": "flow"}}, **settings}))
    return folder


def _prepare(geometry: Geometry, seed: int) -> Any:
    return SimpleNamespace(run=SimpleNamespace(describe=lambda: {"model": model_settings(geometry), "seed": seed}))
