"""Shards opened by pandas, DuckDB, Hugging Face datasets and webdataset, and decoded by PyAV: nothing of ours reads."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import cv2
import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset
from shard_rows import FLOW, HEIGHT, NUM_FRAMES, WIDTH, convention_of, make_row

from pipelines.datasets.shards import Row, ShardSettings, commit_shard
from pipelines.media.codec import CodecSettings

H264, JPEG = CodecSettings(flow_codec="h264"), CodecSettings(flow_codec="jpeg")
LONG_ID = "ü日~a+b=@,-_%20" * 9  # 180 bytes: beyond the 100 that the oldest tar headers hold
CLASS = "wave/up, 'down' \"and\" ünï日"
TRAIN: list[dict[str, Any]] = [
    {"id": "first", "class_name": CLASS, "label": 3},
    {"id": LONG_ID, "source": "a b/#1?%.mp4"},
    {"id": "one-frame", "num_frames": 1, "partial": True, "timing": "order"},
    {"id": "__-6gVmTy_000017_000027"},  # YouTube's ids begin with anything; datasets takes leading __ for hidden
    {"id": "UPPER"},
    # Numbers where the five rows before, from which types are guessed, have nulls.
    {"id": "sixth", "start": 17.0, "end": 27.5, "flow_error_mean": 0.03, "flow_error_max": 1.0},
]
SHARDS = {
    "train-00000": TRAIN,
    "train-00001": [{"id": "more", "label": -1, "class_name": ""}],
    "test-00000": [{"id": "test", "split": "test", "start": 1.0, "end": 2.0}],
}


def write(folder: Path, settings: ShardSettings, codec: CodecSettings) -> Path:
    for name, facts in SHARDS.items():
        rows = [make_row(codec, index, status="ok", **some) for index, some in enumerate(facts)]
        commit_shard(str(folder), name, rows, settings=settings, convention=convention_of(codec), fingerprint="f")
    return folder / "shards"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of Parquet shards."""
    return write(tmp_path_factory.mktemp("parquet"), ShardSettings(format="parquet"), H264)


@pytest.fixture(scope="module", params=[H264, JPEG], ids=["h264", "jpeg"])
def tars(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of WebDataset shards."""
    return write(tmp_path_factory.mktemp("tars"), ShardSettings(format="webdataset"), request.param)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Hugging Face datasets without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    datasets.disable_progress_bars()
    return datasets


def check_rgb(data: bytes, index: int, num_frames: int = NUM_FRAMES) -> None:
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(HEIGHT, WIDTH, 3)] * num_frames
    assert np.allclose([frame.mean() for frame in frames], [16 * index + 4 * i for i in range(num_frames)], atol=4)


def check_flow(data: bytes, convention: Mapping[str, Any], num_frames: int = NUM_FRAMES - 1) -> None:
    """Flow in px by what the convention says, as anybody would write it down."""
    images = read_zip(data) if convention["codec"] == "jpeg" else read_mp4(data)
    assert images.shape == (num_frames, 2 * HEIGHT, WIDTH)
    step = 2 * convention["bound_px"] / (convention["levels"] - 1)
    u, v = np.split((images.astype(float) - convention["zero_code"]) * step, 2, axis=1)
    assert np.allclose(u, FLOW[0], atol=0.2)
    assert np.allclose(v, FLOW[1], atol=0.2)


def read_mp4(data: bytes) -> npt.NDArray[np.integer]:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([np.asarray(frame.to_ndarray(format="gray10le")) for frame in container.decode(video=0)])


def read_zip(data: bytes) -> npt.NDArray[np.integer]:
    with zipfile.ZipFile(io.BytesIO(data)) as pairs:
        names = sorted(pairs.namelist())
        codes = [np.frombuffer(pairs.read(name), np.uint8) for name in names]
    images = [np.asarray(cv2.imdecode(code, cv2.IMREAD_GRAYSCALE)) for code in codes]
    return np.concatenate(np.split(np.stack(images), 2), axis=1)  # flow_x_*, then flow_y_*


def check_sample(facts: Row, rgb: bytes, flow: bytes, convention: Mapping[str, Any]) -> None:
    """One of TRAIN as some library read it."""
    index = [row["id"] for row in TRAIN].index(facts["id"])
    assert {name: facts[name] for name in TRAIN[index]} == TRAIN[index]
    assert (facts["height"], facts["width"], facts["fps"]) == (HEIGHT, WIDTH, 25.0)
    check_rgb(rgb, index, facts["num_frames"])
    if facts["num_frames"] == 1:
        assert flow == b""
    else:
        check_flow(flow, convention["flow"])


def test_pandas(parquet: Path) -> None:
    frame = pd.concat(pd.read_parquet(path) for path in sorted(parquet.glob("train-*.parquet")))
    convention = json.loads(pq.read_schema(parquet / "train-00000.parquet").metadata[b"convention"])
    assert frame["id"].tolist() == [*(row["id"] for row in TRAIN), "more"]
    assert frame["start"].isna().sum() == 6
    for row in frame.to_dict("records")[:-1]:
        check_sample(row, row["rgb"], row["flow"], convention)


def test_pandas_reads_the_folder_as_one_table(parquet: Path) -> None:
    frame = pd.read_parquet(parquet, columns=["id", "split", "label"])
    assert frame.groupby("split").size().to_dict() == {"test": 1, "train": 7}


def query(sql: str) -> list[Row]:
    cursor = duckdb.connect().execute(sql)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


def test_duckdb(parquet: Path) -> None:
    files = f"'{parquet}/train-*.parquet'"
    (found,) = query(f"SELECT DISTINCT value FROM parquet_kv_metadata({files}) WHERE key = 'convention'")
    rows = query(f"SELECT * FROM {files} WHERE label >= 0")
    assert len(rows) == len(TRAIN)
    for row in rows:
        check_sample(row, row["rgb"], row["flow"], json.loads(found["value"]))
    counts = query(f"SELECT class_name, count(*) AS videos FROM {files} GROUP BY ALL ORDER BY ALL")
    assert [(row["class_name"], row["videos"]) for row in counts] == [("", 1), ("wave", 5), (CLASS, 1)]


def test_hugging_face_datasets_of_parquet(parquet: Path, datasets: ModuleType, tmp_path: Path) -> None:
    files = {split: str(parquet / f"{split}-*.parquet") for split in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    convention = json.loads(pq.read_schema(parquet / "train-00000.parquet").metadata[b"convention"])
    assert {split: len(rows) for split, rows in found.items()} == {"train": 7, "test": 1}
    for row in found["train"].select(range(len(TRAIN))):
        check_sample(row, row["rgb"], row["flow"], convention)


def test_hugging_face_datasets_of_webdataset(tars: Path, datasets: ModuleType, tmp_path: Path) -> None:
    files = {split: str(tars / f"{split}-*.tar") for split in ("test", "train")}
    found = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path))["train"]
    (flow,) = (name for name in found.column_names if name.startswith("flow."))
    for name in ("rgb.mp4", "flow.mp4"):
        if name in found.column_names:
            found = found.cast_column(name, datasets.Video(decode=False))
    assert [row["json"]["id"] for row in found] == [*(row["id"] for row in TRAIN), "more"]
    for row in found.select(range(len(TRAIN))):
        data = row[flow]["bytes"] if isinstance(row[flow], dict) else row[flow]
        check_sample(row["json"], row["rgb.mp4"]["bytes"], data, row["json"]["convention"])


def test_webdataset(tars: Path) -> None:
    found = webdataset.WebDataset(f"{tars}/train-{{00000..00001}}.tar", shardshuffle=False).decode(only=["json"])
    samples = list(found)
    keys = [*(row["id"] for row in TRAIN), "more"]
    assert [sample["json"]["id"] for sample in samples] == keys
    assert [sample["__key__"].replace("%5F", "_") for sample in samples] == keys
    for sample in samples[:-1]:
        (flow,) = (sample[name] for name in sample if name.startswith("flow."))
        check_sample(sample["json"], sample["rgb.mp4"], flow, sample["json"]["convention"])


def test_absent_numbers_in_webdataset_are_minus_one(tars: Path) -> None:
    first = next(iter(webdataset.WebDataset(f"{tars}/train-00000.tar", shardshuffle=False)))
    facts = json.loads(first["json"])
    assert {name for name, value in facts.items() if value == -1.0} == {
        *("start", "end", "flow_error_mean", "flow_error_rms", "flow_error_p999", "flow_error_max")
    }
