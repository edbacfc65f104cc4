"""Catalogs of folders, CSV, Kinetics, UCF-101 and HMDB-51: real lists where they are here, small ones otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.compute as pc
import pytest

from pipelines import storage
from pipelines.datasets.annotations import make_id
from pipelines.datasets.catalog import SCHEMA, Catalog, read_catalog
from pipelines.errors import CatalogError

KINETICS_HEADER = "label,youtube_id,time_start,time_end,split"


def _touch(folder: Path, *names: str) -> str:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(folder)


def _write(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _columns(catalog: Catalog, *names: str) -> list[tuple[object, ...]]:
    """Columns of the rows, each split sorted by id: within a split the catalog is shuffled."""
    splits = list(dict.fromkeys(catalog.table["split"].to_pylist()))
    rows = sorted(catalog.table.to_pylist(), key=lambda row: (splits.index(row["split"]), row["id"]))
    return [tuple(row[name] for name in names) for row in rows]


def test_a_folder_per_class(tmp_path: Path) -> None:
    videos = _touch(tmp_path, "wave/b.mp4", "wave/a.AVI", "hand shake/deep/c.mkv", "wave/notes.txt", ".cache/x.mp4")
    catalog = read_catalog(videos)
    assert catalog.table.schema == SCHEMA
    assert catalog.classes == ("hand shake", "wave")
    assert _columns(catalog, "id", "label", "class_name", "split") == [
        ("hand%20shake~deep~c", 0, "hand shake", "all"),
        ("wave~a", 1, "wave", "all"),
        ("wave~b", 1, "wave", "all"),
    ]
    assert _columns(catalog, "path")[1] == (str(tmp_path / "wave/a.AVI"),)


def test_split_folders_above_class_folders(tmp_path: Path) -> None:
    catalog = read_catalog(_touch(tmp_path, "test/a/1.mp4", "validation/b/2.mp4", "train/a/3.mp4", "train/b/4.mp4"))
    assert _columns(catalog, "split", "class_name") == [("train", "a"), ("train", "b"), ("val", "b"), ("test", "a")]


def test_a_flat_folder_is_unlabelled_and_may_hold_odd_containers(tmp_path: Path) -> None:
    catalog = read_catalog(_touch(tmp_path, "a.gif", "b.3gp", "c.webm", "d.png"))
    assert _columns(catalog, "id", "label", "class_name") == [("a", -1, ""), ("b", -1, ""), ("c", -1, "")]
    assert catalog.classes == ()


def test_one_video_file_is_a_catalog_of_one(tmp_path: Path) -> None:
    _touch(tmp_path, "a.mp4", "b.mp4")
    assert _columns(read_catalog(str(tmp_path / "a.mp4")), "path") == [(str(tmp_path / "a.mp4"),)]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    _touch(tmp_path / "elsewhere", "wave/a.mp4")
    _touch(tmp_path / "videos", "kick/b.mp4")
    (tmp_path / "videos/kick/c.mp4").symlink_to(tmp_path / "elsewhere/wave/a.mp4")
    (tmp_path / "videos/wave").symlink_to(tmp_path / "elsewhere/wave")
    assert _columns(read_catalog(str(tmp_path / "videos")), "id") == [("kick~b",), ("kick~c",), ("wave~a",)]


def test_videos_and_annotations_on_s3(s3: str) -> None:
    storage.put(f"{s3}/videos/wave/1.mp4", b"x")
    storage.put(f"{s3}/list.csv", b"path,label\nwave/1.mp4,wave\nwave/2.mp4,wave\n")
    catalog = read_catalog(f"{s3}/videos/", f"{s3}/list.csv")
    assert _columns(catalog, "path") == [(f"{s3}/videos/wave/1.mp4",), (None,)]


def test_files_that_are_left_out_are_counted_by_ending(tmp_path: Path) -> None:
    names = "a.mp4", "b.txt", "c.txt", "README", "d.mp4.part", "e.f137.mp4.part-Frag3", "f.webm.crdownload", "g.avi"
    videos = _touch(tmp_path / "v", *names)
    others = "3 files without the ending of a video: 2 × .txt, 1 × no ending"
    unfinished = "3 unfinished downloads, such as d.mp4.part"
    assert read_catalog(videos).left_out == (others, unfinished)
    annotations = _write(tmp_path / "list.csv", "path,label", "a.mp4,x")
    assert read_catalog(videos, annotations).left_out == (
        others,
        unfinished,
        "1 video that no annotation takes, such as g.avi",
    )


@pytest.mark.parametrize(
    "ending", [".divx", ".m2t", ".MOD", ".wtv", ".insv", ".mjpeg", ".xvid", ".tod", ".lrv", ".360"]
)
def test_endings_that_cameras_and_recorders_use_are_videos(tmp_path: Path, ending: str) -> None:
    assert len(read_catalog(_touch(tmp_path, f"a/x{ending}")).table) == 1


def test_ids_have_no_dot_and_no_slash_and_tell_extensions_apart_only_where_they_must(tmp_path: Path) -> None:
    catalog = read_catalog(_touch(tmp_path, "a.mp4", "a.webm", "v1.2 final~.mp4", "日本.mp4"))
    assert [name for (name,) in _columns(catalog, "id")] == ["a%2Emp4", "a%2Ewebm", "v1%2E2%20final%7E", "日本"]


def test_long_ids_stay_file_names_and_stay_apart() -> None:
    first, second = make_id("日" * 100 + "a"), make_id("日" * 100 + "b")
    assert first != second
    assert max(len(first.encode()), len(second.encode())) <= 200


def test_a_csv_of_paths(tmp_path: Path) -> None:
    videos = _touch(tmp_path / "v", "a/1.mp4", "b/2.mp4", "b/unlisted.mp4")
    rows = "Path,person,Label,split", "b/2.mp4,x,kick,test", "./a/1.mp4,y,wave,training", "a/3.mp4,z,wave,train"
    catalog = read_catalog(videos, _write(tmp_path / "list.csv", *rows))
    assert _columns(catalog, "id", "path", "label", "split") == [
        ("a~1", f"{videos}/a/1.mp4", 1, "train"),
        ("a~3", None, 1, "train"),
        ("b~2", f"{videos}/b/2.mp4", 0, "test"),
    ]


def test_numbers_as_labels_are_ordered_by_value(tmp_path: Path) -> None:
    rows = [f"{number}.mp4,{number}" for number in (10, 9, 0)]
    annotations = _write(tmp_path / "list.csv", "path,label", *rows)
    assert read_catalog(_touch(tmp_path, "10.mp4"), annotations).classes == ("0", "9", "10")


@pytest.mark.parametrize("path", ["../x.mp4", "a/../../x.mp4", "/etc/x.mp4", "s3://bucket/x.mp4", ""])
def test_paths_outside_the_videos_folder_are_refused(tmp_path: Path, path: str) -> None:
    annotations = _write(tmp_path / "list.csv", "path,label", f"{path},a")
    with pytest.raises(CatalogError, match=r"1 path outside the videos folder: list\.csv:2"):
        read_catalog(_touch(tmp_path, "x.mp4"), annotations)


def test_kinetics_names_that_people_have(tmp_path: Path) -> None:
    names = "air_drumming/aaaaaaaaaaa_000417_000427.mkv", "bbbbbbbbbbb.mp4", "train/air drumming/-cccccccccc.webm"
    spans = "aaaaaaaaaaa,417,427", "bbbbbbbbbbb,3,13", "-cccccccccc,0.5,10.5", "ddddddddddd,1,11"
    rows = [f"air drumming,{span},train,0" for span in spans]
    annotations = _write(tmp_path / "train.csv", KINETICS_HEADER + ",is_cc", *rows)
    catalog = read_catalog(_touch(tmp_path / "v", *names), annotations)
    assert _columns(catalog, "id", "path", "start", "end") == [
        ("-cccccccccc_000000%2E500_000010%2E500", str(tmp_path / "v" / names[2]), 0.5, 10.5),
        ("aaaaaaaaaaa_000417_000427", str(tmp_path / "v" / names[0]), None, None),
        ("bbbbbbbbbbb_000003_000013", str(tmp_path / "v" / names[1]), 3.0, 13.0),
        ("ddddddddddd_000001_000011", None, 1.0, 11.0),
    ]


def test_one_kinetics_video_may_hold_two_spans_and_two_classes(tmp_path: Path) -> None:
    rows = "wave,aaaaaaaaaaa,0,10,train", "kick,aaaaaaaaaaa,10,20,train"
    annotations = _write(tmp_path / "train.csv", KINETICS_HEADER, *rows)
    videos = _touch(tmp_path, "kick/aaaaaaaaaaa.mp4", "wave/aaaaaaaaaaa.mp4")
    paths = [(f"{videos}/wave/aaaaaaaaaaa.mp4",), (f"{videos}/kick/aaaaaaaaaaa.mp4",)]
    assert _columns(read_catalog(videos, annotations), "path") == paths


def test_kinetics_files_together_and_one_without_labels(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.csv", KINETICS_HEADER, "wave,aaaaaaaaaaa,0,10,train")
    val = _write(tmp_path / "val.csv", KINETICS_HEADER, "wave,bbbbbbbbbbb,0,10,validate")
    test = _write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split", "ccccccccccc,0,10,test")
    catalog = read_catalog(_touch(tmp_path, "ccccccccccc.mp4"), [train, val, test])
    assert _columns(catalog, "split", "label") == [("train", 0), ("val", 0), ("test", -1)]


def test_the_real_kinetics_files(shared_data: Path, tmp_path: Path) -> None:
    videos = _touch(tmp_path, "abseiling/0wR5jVB-WPk_000417_000427.mp4")
    catalog = read_catalog(videos, str(shared_data / "annotations/kinetics400"))
    counts = catalog.counts().to_pylist()
    assert (len(catalog.table), len(catalog.classes), catalog.source) == (19906 + 38685, 400, "Kinetics")
    assert counts[0] == {"split": "test", "class_name": "", "expected": 38685, "present": 0, "missing": 38685}
    assert counts[1]["class_name"] == "abseiling"
    assert (counts[1]["present"], counts[1]["expected"] - counts[1]["missing"]) == (1, 1)


@pytest.mark.parametrize(("fold", "train", "test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_the_real_ucf101_lists(shared_data: Path, tmp_path: Path, fold: int, train: int, test: int) -> None:
    videos = _touch(tmp_path, "YoYo/v_YoYo_g01_c01.avi", "flat/v_Archery_g01_c01.mp4")
    catalog = read_catalog(videos, str(shared_data / "annotations/ucf101"), fold=fold)
    splits = catalog.table["split"].to_pylist()
    present = catalog.table.filter(pc.is_valid(catalog.table["path"])).to_pylist()
    assert (splits.count("train"), splits.count("test"), len(catalog.classes)) == (train, test, 101)
    assert {(row["class_name"], row["label"]) for row in present} == {("YoYo", 100), ("Archery", 2)}


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_the_real_hmdb51_lists(shared_data: Path, tmp_path: Path, fold: int) -> None:
    videos = _touch(tmp_path, "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi")
    catalog = read_catalog(videos, str(shared_data / "annotations/hmdb51"), fold=fold)
    splits = catalog.table["split"].to_pylist()
    assert (splits.count("train"), splits.count("test"), len(catalog.classes)) == (3570, 1530, 51)
    assert len(catalog.table) - catalog.table["path"].null_count == 1


def test_small_ucf101_and_hmdb51_lists(tmp_path: Path) -> None:
    videos = _touch(tmp_path / "v", "Wave/w_1.avi", "Kick/k_1.avi")
    _write(tmp_path / "ucf/classInd.txt", "1 Wave", "2 Kick")
    _write(tmp_path / "ucf/trainlist01.txt", "Wave/w_1.avi 1")
    _write(tmp_path / "ucf/testlist01.txt", "Kick/k_1.avi")
    _write(tmp_path / "hmdb/Wave_test_split2.txt", "w_1.avi 1 ", "w_2.avi 0 ")
    _write(tmp_path / "hmdb/Kick_test_split2.txt", "k_1.avi 2 ")
    ucf, hmdb = read_catalog(videos, str(tmp_path / "ucf")), read_catalog(videos, str(tmp_path / "hmdb"), fold=2)
    assert _columns(ucf, "id", "label", "split") == [("w_1", 0, "train"), ("k_1", 1, "test")]
    assert _columns(hmdb, "id", "label", "split") == [("w_1", 1, "train"), ("k_1", 0, "test")]


def test_a_real_csv_of_paths(shared_data: Path) -> None:
    folder = shared_data / "ut_interaction"
    catalog = read_catalog(str(folder), str(folder / "annotations.csv"))
    counts = catalog.counts()
    assert [sum(counts[name].to_pylist()) for name in ("expected", "present", "missing")] == [120, 120, 0]
    assert [row["expected"] for row in counts.to_pylist()] == [10] * 12


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["a,x,0,10,train", "b,x,0,10,val"],
            r"1 duplicate id: x_000000_000010 \(list\.csv:2, list\.csv:3\)\. .*remove",
        ),
        (["a,x,zero,10,train"], r"1 span other than two numbers: list\.csv:2 'zero,10'"),
        (["a,x,nan,10,train"], "1 span other than two numbers"),
        (["a,x,20,10,train", "a,y,-1,10,train"], "2 negative, empty or reversed spans: .*20–10.*-1–10"),
        (["a,x,0,10"], r"1 row without the 5 columns of the header: list\.csv:2 has 4"),
        (["a,,0,10,train"], "1 row without a youtube_id"),
        (["a,x,0,10,../up"], r"1 unusable split name: list\.csv:2 '\.\./up'"),
        ([f"a,y{i},9,1,train" for i in range(7)], r"7 negative.*list\.csv:6 9–1, …"),
        (["a,x,0,10,A", "a,y,0,10,a"], "1 split name written in two ways: 'A' and 'a'"),
        (
            ["a,missing,0,10,train"],
            "none of the 1 annotated .*looked for missing_000000_000010 or missing.*such as x.mp4",
        ),
    ],
)
def test_rows_that_cannot_be_meant_are_one_error(tmp_path: Path, rows: list[str], message: str) -> None:
    annotations = _write(tmp_path / "list.csv", KINETICS_HEADER, *rows)
    with pytest.raises(CatalogError, match=message):
        read_catalog(_touch(tmp_path / "v", "x.mp4"), annotations)


def test_labels_outside_the_class_list_are_refused(tmp_path: Path) -> None:
    annotations = _write(tmp_path / "list.csv", "path,label", "x.mp4,wave", "y.mp4,wavee")
    classes = _write(tmp_path / "label_map.txt", "kick", "wave")
    with pytest.raises(CatalogError, match=r"1 unknown label: wavee. The class list has 2 classes: kick, wave"):
        read_catalog(_touch(tmp_path, "x.mp4"), [annotations, classes])


@pytest.mark.parametrize("line", ["Kick/k.avi 2", "Wave/w.avi 2", "w.avi 1"])
def test_a_ucf101_line_that_disagrees_with_the_class_index_is_refused(tmp_path: Path, line: str) -> None:
    _write(tmp_path / "classInd.txt", "1 Wave")
    _write(tmp_path / "testlist01.txt", "Wave/v.avi")
    _write(tmp_path / "trainlist01.txt", line)
    with pytest.raises(CatalogError, match=r"1 line with an unknown label: trainlist01\.txt:1"):
        read_catalog(_touch(tmp_path, "w.avi"), str(tmp_path))


def test_a_fold_without_files_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "ucf/classInd.txt", "1 Wave")
    _write(tmp_path / "ucf/trainlist01.txt", "Wave/w.avi 1")
    _write(tmp_path / "hmdb/Wave_test_split1.txt", "w.avi 1 ")
    _write(tmp_path / "csv/list.csv", "path,label", "w.avi,Wave")
    videos = _touch(tmp_path / "v", "w.avi")
    for kind, message in [("ucf", "no trainlist04"), ("hmdb", "1 split file absent"), ("csv", "only UCF-101 and")]:
        with pytest.raises(CatalogError, match=message):
            read_catalog(videos, str(tmp_path / kind), fold=4)


def test_an_empty_split_lists_the_splits_there_are(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"split 'val' has no rows. Choose one of test, train"):
        read_catalog(_touch(tmp_path, "train/a/1.mp4", "test/a/2.mp4"), split="val")


def test_inputs_of_no_known_kind_name_what_was_looked_for(tmp_path: Path) -> None:
    videos = _touch(tmp_path / "v", "a.mp4")
    with pytest.raises(CatalogError, match="no annotation file or folder at"):
        read_catalog(videos, str(tmp_path / "absent.csv"))
    with pytest.raises(CatalogError, match=r"no annotations recognised.*notes.md.*classInd.txt.*CLASS_test_splitN"):
        read_catalog(videos, _write(tmp_path / "notes.md", "x"))
    with pytest.raises(CatalogError, match=r"columns missing: list.csv has video, class.*path,label"):
        read_catalog(videos, _write(tmp_path / "list.csv", "video,class", "a.mp4,b"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogError, match="is neither UTF-8 nor UTF-16"):
        read_catalog(videos, str(tmp_path / "binary.csv"))


def test_folders_without_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no videos folder at"):
        read_catalog(str(tmp_path / "absent"))
    with pytest.raises(CatalogError, match=r"no videos in .*: the folder is empty\. Check the path"):
        read_catalog(_touch(tmp_path))
    with pytest.raises(CatalogError, match=r"no videos in .*1 file without the ending .*1 × \.txt.*\.mp4") as error:
        read_catalog(_touch(tmp_path, "notes.txt"))
    assert len(str(error.value)) < 400
    with pytest.raises(CatalogError, match=r"1 class \(UCF-101: 2\).*give UCF-101 as the videos folder"):
        read_catalog(_touch(tmp_path, "UCF-101/wave/a.avi", "UCF-101/kick/b.avi"))
    assert read_catalog(str(tmp_path), layout="split-class").classes == ("kick", "wave")


def test_a_file_name_that_no_table_can_hold_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).write_bytes(b"")
    with pytest.raises(CatalogError, match="1 video file name in another encoding than UTF-8"):
        read_catalog(str(tmp_path))


def test_the_limit_spreads_over_the_videos_that_are_there(tmp_path: Path) -> None:
    rows = [f"{name}/{number}.mp4,{name}" for name in "abc" for number in range(4)]
    annotations = _write(tmp_path / "list.csv", "path,label", *rows)
    videos = _touch(tmp_path, *(f"{name}/{number}.mp4" for name in "abc" for number in (1, 3)))
    catalog = read_catalog(videos, annotations, limit=3)
    assert _columns(catalog, "id") == [("a~1",), ("b~1",), ("c~1",)]
    assert len(read_catalog(videos, annotations, limit=100).table) == 6
    with pytest.raises(CatalogError, match="limit 0: at least 1"):
        read_catalog(videos, annotations, limit=0)


def test_each_part_of_a_split_holds_all_classes(tmp_path: Path) -> None:
    rows = [f"{name}/{number}.mp4,{name}" for name in "abcd" for number in range(32)]
    catalog = read_catalog(_touch(tmp_path, "a/0.mp4"), _write(tmp_path / "list.csv", "path,label", *rows))
    names = catalog.table["class_name"].to_pylist()
    assert all(set(names[start : start + 32]) == set("abcd") for start in range(0, 128, 32))


def test_rows_do_not_depend_on_the_order_of_the_annotation_files(tmp_path: Path) -> None:
    first = _write(tmp_path / "1.csv", "path,label,split", "b.mp4,x,test", "a.mp4,y,train")
    second = _write(tmp_path / "2.csv", "path,label,split", "c.mp4,x,train")
    videos = _touch(tmp_path, "a.mp4")
    assert read_catalog(videos, [first, second]).table == read_catalog(videos, [second, first]).table


def test_a_layout_is_for_folders_without_annotations(tmp_path: Path) -> None:
    annotations = _write(tmp_path / "list.csv", "path,label", "a.mp4,x")
    with pytest.raises(CatalogError, match=r"layout flat .* leave it out"):
        read_catalog(_touch(tmp_path, "a.mp4"), annotations, layout="flat")


def test_classes_are_counted_in_the_order_of_their_labels(tmp_path: Path) -> None:
    catalog = read_catalog(
        _touch(tmp_path, *(f"{name}/{i}.mp4" for name in (10, 9, 8, 7) for i in range(name)), "x.mp4")
    )
    assert catalog.describe_classes() == "7: 7, 8: 8, 9: 9, … (4 in all); 1 without a label"


def test_a_class_that_nothing_trains_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_catalog(_touch(tmp_path, "train/wave/1.mp4", "test/wavee/2.mp4"))
    assert "no train row for 1 class, such as wavee" in caplog.text
