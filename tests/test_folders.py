"""What the folders above videos mean: classes, splits above classes, nothing; or a refusal that names both readings."""

from __future__ import annotations

import pytest

from pipelines.datasets.annotations import CatalogError
from pipelines.datasets.folders import Layout, annotate_folders

Rows = set[tuple[str, str]]  # split, class

MMACTION = ["videos_train/a/1.mp4", "videos_val/a/1.mp4", "videos_train/b/1.mp4"]
PARTLY = ["wave/1.mp4", "kick/2.mp4", "test/3.mp4"]
HOLDOUT = ["train/a/1.mp4", "val/a/2.mp4", "holdout/b/3.mp4"]


def read(paths: list[str], layout: Layout = "auto") -> tuple[Rows, tuple[str, ...]]:
    found = annotate_folders(paths, layout)
    return {(row.split, row.class_name) for row in found.rows}, found.classes


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (["a/1.mp4", "b/deep/2.mp4"], {("all", "a"), ("all", "b")}),
        (["Train/a/1.mp4", "validation/b/2.mp4"], {("train", "a"), ("val", "b")}),
        (["train/1.mp4", "test/2.mp4"], {("train", ""), ("test", "")}),
        (MMACTION, {("train", "a"), ("val", "a"), ("train", "b")}),
        (["train_256/a/1.mp4", "val_256/a/2.mp4"], {("train", "a"), ("val", "a")}),
        (["training dog/1.mp4", "test drive/2.mp4"], {("all", "training dog"), ("all", "test drive")}),
        (["1.mp4", "2.mp4"], {("all", "")}),
    ],
)
def test_layouts_that_are_understood(paths: list[str], rows: Rows) -> None:
    assert read(paths)[0] == rows


@pytest.mark.parametrize(
    ("paths", "readings"),
    [
        (PARTLY, ("3 classes (kick: 1, test: 1, wave: 1)", "3 splits (kick: 1, test: 1, wave: 1) without classes")),
        (
            HOLDOUT,
            ("3 classes (holdout: 1, train: 1, val: 1)", "(holdout: 1, train: 1, val: 1) of 2 classes (a: 2, b: 1)"),
        ),
        (["UCF-101/wave/a.avi", "UCF-101/kick/b.avi"], ("1 class (UCF-101: 2)", "2 classes (kick: 1, wave: 1)")),
        (["x/wave/a.avi", "y/wave/b.avi"], ("2 classes (x: 1, y: 1)", "2 splits (x: 1, y: 1) of 1 class (wave: 2)")),
        (["videos_train/1.mp4", "videos_val/1.mp4"], ("2 classes", "2 splits (train: 1, val: 1) without classes")),
        (["train/a/1.mp4", "2.mp4"], ("1 class (train: 1)", "video outside the split folders: 2.mp4")),
    ],
)
def test_layouts_that_may_mean_two_things_are_refused_with_both(paths: list[str], readings: tuple[str, ...]) -> None:
    with pytest.raises(CatalogError, match=r"--layout class .* --layout split-class") as error:
        read(paths)
    assert all(reading in str(error.value) for reading in readings), error.value


def test_the_layout_may_be_said() -> None:
    assert read(PARTLY, "class") == ({("all", "wave"), ("all", "kick"), ("all", "test")}, ("kick", "test", "wave"))
    assert read(HOLDOUT, "split-class") == ({("train", "a"), ("val", "a"), ("holdout", "b")}, ("a", "b"))
    assert read(HOLDOUT, "flat") == ({("all", "")}, ())
    assert read(MMACTION, "class")[1] == ("videos_train", "videos_val")


def test_a_split_folder_needs_a_name_for_files_and_every_video_one() -> None:
    with pytest.raises(CatalogError, match=r"1 unusable split name: 'my split'.*letters, digits"):
        read(["my split/a/1.mp4"], "split-class")
    with pytest.raises(CatalogError, match=r"1 video outside the split folders: 1.mp4"):
        read(["1.mp4", "train/a/2.mp4"], "split-class")


def test_class_folders_are_named_as_labels_are() -> None:
    assert read(["10/a.mp4", "9/b.mp4"])[1] == ("9", "10")
    assert read(["-1/a.mp4", "0/b.mp4"]) == ({("all", ""), ("all", "0")}, ("0",))
    with pytest.raises(CatalogError, match=r"'Run' \(1\) and 'run' \(1\)"):
        read(["Run/a.mp4", "run/b.mp4"])
