"""The index knows every video of the catalog and finds the usable ones in their shards."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.clips.numbered import open_row
from pipelines.datasets import shards
from pipelines.datasets.records import FrameSampling
from pipelines.datasets.video_index import VideoIndex, check_trainable, read_index, with_fold
from pipelines.errors import DataError


def test_every_catalog_video_is_there_with_its_fate(motion_shards: str) -> None:
    index = read_index(motion_shards)
    found = Counter(zip(index.table["split"].to_pylist(), index.table["status"].to_pylist(), strict=True))
    assert found == {("train", "ok"): 12, ("test", "ok"): 6, ("test", "quarantined"): 1, ("test", "missing"): 1}
    assert (index.sampling, len(index.classes)) == (FrameSampling(fps=25.0, short_side=40), 6)
    assert index.convention.flow["bound_px"] == 20


def test_usable_videos_are_found_in_their_shards(motion_shards: str) -> None:
    index = read_index(motion_shards).usable()
    assert len(index) == 18
    for place in range(len(index)):
        video = index.row(place)
        row = shards.read_row(video["file"], video["row"], ["rgb"], version=video["version"])
        assert row["id"] == video["id"]
        assert row["rgb"][4:8] == b"ftyp"


def test_an_unknown_split_is_refused_with_the_known_ones(motion_shards: str) -> None:
    with pytest.raises(DataError, match="no split 'val': choose one of test, train"):
        read_index(motion_shards).of_split("val")


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished data set"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("how", ["unlisted", "shorter"])
def test_tables_of_another_moment_than_the_list_of_shards_are_refused(
    motion_shards: str, tmp_path: Path, how: str
) -> None:
    """As whoever reads a data set meets it while a retry ends there: videos would be looked for at others' places."""
    shutil.copy(Path(motion_shards) / "videos.parquet", tmp_path)
    values = json.loads((Path(motion_shards) / "dataset.json").read_text())
    if how == "unlisted":
        del values["shards"][0]
    else:
        values["shards"][0]["rows"] -= 1
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"videos.parquet and dataset.json differ about shard \w+-00000\. If"):
        read_index(str(tmp_path))


def label(index: VideoIndex, names: list[str]) -> VideoIndex:
    """The index with other class names on its videos, usable ones first."""
    index = replace(index.usable(), classes=tuple(sorted({*names} - {""})))
    index = replace(index, table=index.table.slice(0, len(names)))
    labels = [index.classes.index(name) if name else -1 for name in names]
    table = index.table.drop_columns(["label", "class_name", "split"])
    for name, values in {"label": labels, "class_name": names, "split": ["train"] * len(names)}.items():
        table = table.append_column(name, [values])
    return replace(index, table=table)


def test_what_cannot_be_learnt_from_is_said_before(motion_shards: str) -> None:
    index = read_index(motion_shards)
    assert check_trainable(index, "train") == []
    with pytest.raises(DataError, match=r"has no labels on 3 videos: .*--annotations"):
        check_trainable(label(index, ["", "", ""]), "train")
    assert "one class (up)" in check_trainable(label(index, ["up", "up", ""]), "train")[0]
    assert "one video" in check_trainable(label(index, ["up"]), "train")[0]
    (said,) = check_trainable(replace(label(index, ["up", "left"]), classes=("a", "left", "up")), "train")
    assert said == "1 of 3 classes has no video to train on, such as a"
    lost = replace(index, table=index.table.set_column(5, "status", [["missing"] * len(index)]))
    with pytest.raises(DataError, match=r"no video of split 'train' is in a shard: 12 missing"):
        check_trainable(lost, "train")


def test_a_data_set_is_called_as_the_user_called_it(motion_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(motion_shards).parent)
    given = Path(motion_shards).name
    with pytest.raises(DataError, match=f"^{given} has no split"):
        read_index(given).of_split("val")
    with pytest.raises(DataError, match=r"^nowhere holds no finished"):
        read_index("nowhere")


def test_another_division_of_the_same_videos(motion_shards: str, tmp_path: Path) -> None:
    index = read_index(motion_shards)
    rows = ["path,label,split", "train/up/up_0000.mp4,up,test", "test/up/up_0002.mp4,up,train", "no.mp4,left,train"]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    divided = with_fold(index, [str(tmp_path / "list.csv")], 1)
    assert divided.classes == ("left", "up")
    assert divided.table["split"].to_pylist() == ["test", "train", "train"]
    assert divided.table["status"].to_pylist() == ["ok", "ok", "missing"]
    assert divided.table["label"].to_pylist() == [1, 1, 0]
    video = divided.row(0)
    row = shards.read_row(video["file"], video["row"], ["rgb"], version=video["version"])
    assert row["id"] == video["id"] == "train~up~up_0000"


def test_official_folds_find_videos_by_the_name_of_their_file(tmp_path: Path, motion_shards: str) -> None:
    for name in ("left", "up"):
        lines = [f"{name}_{index:04d}.mp4 {use}" for index, use in ((0, 1), (1, 2), (2, 0))]
        (tmp_path / f"{name}_test_split2.txt").write_text("\n".join(lines) + "\n")
    divided = with_fold(read_index(motion_shards), [str(tmp_path)], 2)
    assert divided.table["status"].to_pylist() == ["ok"] * 4
    assert open_row(divided.row(0), ["flow"])("flow", 0, 5).shape[0] == 5
    assert divided.table["split"].to_pylist().count("train") == 2


@pytest.mark.parametrize(
    ("fps", "words"), [("native", "frames at their videos' own rate"), (12.0, "12 frames a second")]
)
def test_whoever_trains_on_frames_of_another_rate_is_told(motion_shards: str, fps: float, words: str) -> None:
    index = read_index(motion_shards)
    assert check_trainable(index, "train") == []
    (note,) = check_trainable(replace(index, sampling=FrameSampling(fps=fps, short_side=40)), "train")
    assert f"holds {words}; networks count clips in frames" in note


def test_the_shorter_side_of_an_exact_size() -> None:
    assert FrameSampling(fps=25.0, short_side=256, frame_size="340x200").shorter_side == 200
    assert FrameSampling(fps=25.0, short_side=96).shorter_side == 96
