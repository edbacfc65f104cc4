"""Tables of annotations as people and their spreadsheets write them: understood, or refused by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.datasets.annotations import Annotations, CatalogError, read_annotations

KINETICS = "label,youtube_id,time_start,time_end"


def read(folder: Path, *lines: str, encoding: str = "utf-8", end: str = "\n") -> Annotations:
    (folder / "list.csv").write_bytes("".join(f"{line}{end}" for line in lines).encode(encoding))
    return read_annotations([str(folder / "list.csv")])


def labels(annotations: Annotations) -> list[str]:
    return [row.class_name for row in annotations.rows]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_spreadsheets_export_is_read(tmp_path: Path, mark: str, encoding: str) -> None:
    lines = mark.join(["path", "label"]), mark.join(["ü/1.mp4", '"a, b; c"']), mark * 1
    found = read(tmp_path, *lines, encoding=encoding, end="\r\n")
    assert [(row.path, row.class_name) for row in found.rows] == [("ü/1.mp4", "a, b; c")]


def test_a_table_of_tabs_may_say_so_by_its_ending(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("path\tlabel\n1.mp4\ta\n")
    assert labels(read_annotations([str(tmp_path / "list.tsv")])) == ["a"]


@pytest.mark.parametrize(("encoding", "message"), [("cp1252", "is neither UTF-8 nor"), ("utf-16-le", "zero bytes")])
def test_text_of_no_known_encoding_is_refused(tmp_path: Path, encoding: str, message: str) -> None:
    with pytest.raises(CatalogError, match=rf"list\.csv' .*{message}.*Save it as UTF-8"):
        read(tmp_path, "path,label", "ü.mp4,a", encoding=encoding)


def test_windows_paths_are_read(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "path,label", r"wave\.\1.mp4,wave").rows
    assert (row.id, row.path) == ("wave~1", "wave/1.mp4")
    for path in (r"C:\videos\1.mp4", r"\\server\videos\1.mp4", r"wave\..\..\1.mp4"):
        with pytest.raises(CatalogError, match=r"1 path outside the videos folder: list\.csv:2"):
            read(tmp_path, "path,label", f"{path},wave")


@pytest.mark.parametrize("twins", [("Run", "run"), ("hand shake", "hand_shake"), ("2", "2.0"), ("1", "01")])
def test_a_class_that_is_written_in_two_ways_is_refused(tmp_path: Path, twins: tuple[str, str]) -> None:
    lines = "path,label", f"1.mp4,{twins[0]}", f"2.mp4,{twins[1]}", f"3.mp4,{twins[1]}"
    with pytest.raises(CatalogError, match=r"written in two ways: '.+' \(\d\) and '.+' \(\d\).*class list"):
        read(tmp_path, *lines)


def test_a_class_list_may_name_both(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("run\nRun\n")
    (tmp_path / "list.csv").write_text("path,label\n1.mp4,Run\n2.mp4,run\n")
    assert read_annotations([str(tmp_path)]).classes == ("run", "Run")


def test_numbers_are_ordered_by_value_however_they_are_written(tmp_path: Path) -> None:
    assert read(tmp_path, "path,label", "1.mp4,10.0", "2.mp4,2.0", "3.mp4,0.0").classes == ("0.0", "2.0", "10.0")
    assert read(tmp_path, "path,label", "1.mp4,x10", "2.mp4,x2").classes == ("x10", "x2")


@pytest.mark.parametrize("none", ["-1", "-1.0"])
def test_minus_one_is_no_label(tmp_path: Path, none: str) -> None:
    found = read(tmp_path, "path,label", "1.mp4,0", f"2.mp4,{none}")
    assert (labels(found), found.classes) == (["0", ""], ("0",))
    assert labels(read(tmp_path, KINETICS, f"{none},x,0,10", "a,y,0,10")) == ["", "a"]


def test_other_numbers_below_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"1 label below zero: -2\. .*-1"):
        read(tmp_path, "path,label", "1.mp4,0", "2.mp4,-2")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"1 column that list\.csv has twice: label"):
        read(tmp_path, "path,label,Label", "1.mp4,a,b")
    assert labels(read(tmp_path, "path,label,,", "1.mp4,a,,")) == ["a"]


def test_rows_know_their_file_and_line(tmp_path: Path) -> None:
    assert read(tmp_path, "path,label", "", '"1.mp4","a', 'b"', "2.mp4,c").rows[1].place == "list.csv:5"
    (tmp_path / "classInd.txt").write_text("1 Wave\n")
    (tmp_path / "trainlist01.txt").write_text("\nWave/w.avi 1\n")
    (tmp_path / "testlist01.txt").write_text("Wave\\v.avi\n")
    rows = read_annotations([str(tmp_path)]).rows
    assert [(row.place, row.path) for row in rows] == [
        ("trainlist01.txt:2", "Wave/w.avi"), ("testlist01.txt:1", "Wave/v.avi"),
    ]  # fmt: skip


@pytest.mark.parametrize("span", ["5,5", "20,10", "-1,10", "zero,10", ",", "nan,10", "0,inf"])
def test_a_span_that_holds_no_time_costs_its_row(tmp_path: Path, span: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = read(tmp_path, KINETICS, "a,x,0,10", f"a,y,{span}").rows
    assert (good.start, good.end) == (0, 10)
    assert bad.start is not None
    assert bad.end is not None
    assert not 0 <= bad.start < bad.end < float("inf")
    assert bad.start > -2  # a number, which JSON can hold
    assert "1 rows of list.csv have a span that holds no time" in caplog.text
    assert "list.csv:3" in caplog.text


def test_a_table_without_any_good_span_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"2 spans other than two numbers: list\.csv:2 '0:00,0:10'"):
        read(tmp_path, KINETICS, "a,x,0:00,0:10", "a,y,0:10,0:20")
