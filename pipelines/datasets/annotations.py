"""Annotation files → one row per annotated video: id, class, split, span and the names its file may have.

Four kinds are told apart by what lies in them, not by a flag: a CSV `path,label[,split]`, Kinetics CSV files, the
UCF-101 lists and the HMDB-51 split files (folders.py reads folders without any). CSV files may be what spreadsheets
export: commas, semicolons or tabs, UTF-8 or UTF-16. Nothing here looks at a video; catalog.py finds the files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines import storage
from pipelines.errors import CatalogError
from pipelines.formatting import format_count

SPLIT_SYNONYMS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
UNLABELLED = re.compile(r"-1(\.0*)?")  # as in the shards
WHOLE = "all"  # the split of rows that name none
MAX_ID_BYTES = 200  # a file name holds 255, and readers append endings such as .flow.mp4
_NO_SPAN = (-1.0, -1.0)  # what stands for text that is no span: the decoder refuses it as an empty one
_UNSAFE = re.compile(r"[^\w\-+=,@/]")
_NO_ID = re.compile(r"[^\w\-+=,@~%]")

logger = logging.getLogger(__name__)


class Annotation(NamedTuple):
    """What is known of one video before its file is looked for.

    The file is looked for as `path` (exact, relative to the videos folder), then by its name without folder and
    extension: `trimmed` (a file cut to the span already), then `stem`. An unlabelled video has an empty `class_name`.
    A span that holds no time (end <= start, or negative) is kept as it is: the decoder refuses it by name. `place` is
    the row's file and line.
    """

    id: str
    class_name: str
    split: str
    path: str = ""
    trimmed: str = ""
    stem: str = ""
    start: float | None = None  # seconds
    end: float | None = None
    place: str = ""


@dataclass(frozen=True)
class Annotations:
    """All rows of one source; a label is a position in `classes`."""

    rows: list[Annotation]
    classes: tuple[str, ...]
    source: str


def refuse(noun: str, problem: str, offenders: Sequence[str], remedy: str) -> None:
    """Raise a CatalogError that counts the offenders and names the first five; nothing where there are none.

    `noun` is what one of them is, `problem` what is wrong with it, or with them.
    """
    if offenders:
        more = ", …" if len(offenders) > 5 else ""
        counted = f"{format_count(len(offenders), noun)} {problem}".strip()
        raise CatalogError(f"{counted}: {', '.join(offenders[:5])}{more}. {remedy}")


def make_id(name: str) -> str:
    """A name as an id: file-system safe, no dot and no slash (WebDataset cuts its key at the first dot).

    Slashes become `~`; every other character that is not a letter, digit or one of `_-+=,@` becomes its UTF-8 bytes as
    %XX, so two names never share an id and the name can be read back. Beyond 200 bytes the tail becomes a SHA-256.
    """
    escaped = _UNSAFE.sub(lambda unsafe: "".join(f"%{byte:02X}" for byte in unsafe[0].encode()), name)
    made = escaped.replace("/", "~")
    if len(made.encode()) <= MAX_ID_BYTES:
        return made
    # 16 digits of the hash and the ~ before them; a character that is cut in two is left out.
    head = made.encode()[: MAX_ID_BYTES - 17].decode(errors="ignore")
    return f"{head}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def is_id(name: object) -> bool:
    """Whether `make_id` may have made this: what it may not have made must not become a file's name."""
    return isinstance(name, str) and 0 < len(name.encode(errors="replace")) <= MAX_ID_BYTES and not _NO_ID.search(name)


def make_path_ids(paths: Sequence[str]) -> list[str]:
    """Ids of relative paths: without the extension, except where two files differ in nothing else."""
    stems = [posixpath.splitext(path)[0] for path in paths]
    shared = Counter(stems)
    return [make_id(stem if shared[stem] == 1 else path) for stem, path in zip(stems, paths, strict=True)]


def read_annotations(sources: Sequence[str], *, fold: int = 1) -> Annotations:
    """Read annotation files, or folders of them, of any known kind.

    `fold` picks one of the three official train/test divisions of UCF-101 and HMDB-51. Raises CatalogError where a file
    is absent, of no known kind, or holds rows that cannot be meant.
    """
    files = list(_expand(sources))
    names = {posixpath.basename(uri): uri for uri in files}
    if "classInd.txt" in names:
        return _read_ucf101(names, fold)
    if any(_HMDB_FILE.fullmatch(name) for name in names):
        return _read_hmdb51(names, fold)
    tables = [_read_csv(uri) for uri in files if uri.lower().endswith((".csv", ".tsv"))]
    if not tables:
        raise CatalogError(
            f"no annotations recognised in {', '.join(sources)}: found {', '.join(sorted(names)[:5]) or 'no file'}. "
            "Looked for *.csv (path,label[,split] or Kinetics), classInd.txt with trainlist0N.txt and testlist0N.txt "
            "(UCF-101), CLASS_test_splitN.txt (HMDB-51)"
        )
    if fold != 1:
        raise CatalogError(f"fold {fold} of a CSV: only UCF-101 and HMDB-51 have folds. Leave the fold out")
    return _read_tables(tables, _read_class_list(names))


def read_labels(labels: Iterable[str]) -> list[str]:
    """Labels with -1, which stands for none, as empty ones. Raises CatalogError for other numbers below zero."""
    read = ["" if UNLABELLED.fullmatch(label) else label for label in labels]
    below = sorted({label for label in read if re.fullmatch(r"-\d+(\.\d*)?", label)})
    refuse("label", "below zero", below, "A label is a name or a number from 0 on; -1 means that there is none")
    return read


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels in use, in order: numbers by value, names by letter.

    Raises CatalogError where two are the same but for case, spaces, underscores or how a number is written.
    """
    counts = Counter(labels)
    # No class. A Counter lets a key be deleted that it has not.
    del counts[""]
    ways: dict[str, list[str]] = {}
    for label in sorted(counts):
        ways.setdefault(_fold_label(label), []).append(label)
    twins = [" and ".join(f"{label!r} ({counts[label]})" for label in same) for same in ways.values() if same[1:]]
    remedy = "Write each class in one way; if they are two, give a class list too: list.csv classes.txt"
    refuse("class", "written in two ways", twins, remedy)
    numbers = all(map(_is_number, counts))
    # As text 10 would come before 2.
    return tuple(sorted(counts, key=lambda label: (float(label) if numbers else 0, label)))


def _is_number(label: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?", label) is not None


def _fold_label(label: str) -> str:
    if _is_number(label):
        whole, _, rest = label.partition(".")
        return f"{whole.lstrip('0')}.{rest.rstrip('0')}"
    # NFKC: an accent may be a character of its own, and look the same.
    return re.sub(r"[\s_]+", " ", unicodedata.normalize("NFKC", label).casefold()).strip()


def read_split(name: str) -> str:
    """A split's name, `val` for `validation` and the like."""
    return SPLIT_SYNONYMS.get(name.lower(), name)


def check_splits(splits: Sequence[str], places: Sequence[str]) -> None:
    """CatalogError, with the places, for splits whose names cannot be those of shards."""
    usable = {split: bool(re.fullmatch(r"\w[\w-]*", split)) and len(split.encode()) <= 64 for split in set(splits)}
    wrong = [f"{place} {split!r}".strip() for place, split in zip(places, splits, strict=True) if not usable[split]]
    remedy = "A split names shards: letters, digits, '_' and '-', at most 64 bytes, such as train"
    refuse("unusable split name", "", wrong, remedy)


def _expand(sources: Sequence[str]) -> Iterator[str]:
    for source in sources:
        if storage.is_dir(source):
            yield from (storage.join(source, file.path) for file in storage.list_files(source))
        elif storage.exists(source):
            yield source
        else:
            raise CatalogError(f"no annotation file or folder at {source!r}. Check the path")


def _read_text(uri: str) -> str:
    """The whole file, in UTF-8, or in UTF-16 if it begins with that one's mark (as Excel writes it)."""
    data = storage.read_bytes(uri)
    # Without its mark, UTF-16 has a zero in every second byte of plain text.
    if b"\0" in data[:2]:
        raise CatalogError(f"{uri!r} holds zero bytes: no text, or UTF-16 without its mark. Save it as UTF-8")
    try:
        # -sig: Excel writes a mark before UTF-8 too, which would belong to the first column's name.
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{uri!r} is neither UTF-8 nor UTF-16 text ({error}). Save it as UTF-8") from error


def _read_lines(uri: str) -> list[tuple[str, str]]:
    """Place (file and line) and text of each line that is not empty."""
    name = posixpath.basename(uri)
    lines = enumerate(_read_text(uri).splitlines(), 1)
    return [(f"{name}:{number}", line.strip()) for number, line in lines if line.strip()]


@dataclass(frozen=True)
class _CsvTable:
    name: str
    columns: dict[str, int]
    rows: list[tuple[int, list[str]]]  # line number, cells

    def column(self, name: str, default: str = "") -> list[str]:
        if name not in self.columns:
            return [default] * len(self.rows)
        index = self.columns[name]
        return [cells[index].strip() for _, cells in self.rows]

    def places(self) -> list[str]:
        return [f"{self.name}:{line}" for line, _ in self.rows]


def _read_csv(uri: str) -> _CsvTable:
    name = posixpath.basename(uri)
    text = _read_text(uri)
    # csv itself tells line ends within quotes from those of rows.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_find_delimiter(text))
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise CatalogError(f"{name}:{reader.line_num} is not CSV: {error}") from error
    if not rows:
        raise CatalogError(f"{name} is empty. A header and one row per video are needed")
    header = [cell.strip().lower() for cell in rows[0][1]]
    twice = [column for column in sorted(_KNOWN_COLUMNS) if header.count(column) > 1]
    refuse("column", f"that {name} has twice", twice, "Leave the one that counts")
    wrong = [f"{name}:{line} has {len(cells)}" for line, cells in rows[1:] if len(cells) != len(header)]
    refuse("row", f"without the {len(header)} columns of the header", wrong, "Quote cells that hold the delimiter")
    return _CsvTable(name, {column: index for index, column in enumerate(header)}, rows[1:])


def _find_delimiter(text: str) -> str:
    """What cuts the header into most columns: a comma, or what spreadsheets of other countries put in its place."""
    header = text.lstrip().partition("\n")[0]
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


_KINETICS_COLUMNS = {"youtube_id", "time_start", "time_end"}
_KNOWN_COLUMNS = {*_KINETICS_COLUMNS, "path", "label", "split"}


def _read_tables(tables: Sequence[_CsvTable], classes: tuple[str, ...]) -> Annotations:
    if all(table.columns.keys() >= _KINETICS_COLUMNS for table in tables):
        rows = [row for table in tables for row in _read_kinetics(table)]
        source = "Kinetics"
    elif all(table.columns.keys() >= {"path", "label"} for table in tables):
        rows = _read_paths(tables)
        source = "a CSV of paths"
    else:
        headers = "; ".join(f"{table.name} has {', '.join(table.columns)}" for table in tables)
        raise CatalogError(
            f"columns missing: {headers}. Allowed headers, the same kind in every file: path,label[,split] or "
            "[label,]youtube_id,time_start,time_end[,split]"
        )
    return Annotations(rows, _check_labels(rows, classes), source)


def _read_paths(tables: Sequence[_CsvTable]) -> list[Annotation]:
    places = [place for table in tables for place in table.places()]
    # Lists are written on Windows, too.
    given = [path.replace("\\", "/") for table in tables for path in table.column("path")]
    outside = [f"{place} {path!r}" for place, path in zip(places, given, strict=True) if _escapes(path)]
    refuse("path", "outside the videos folder", outside, "Give paths relative to the videos folder, without '..'")
    paths = [posixpath.normpath(path) for path in given]
    labels = [label for table in tables for label in table.column("label")]
    if any(labels):
        empty = [place for place, label in zip(places, labels, strict=True) if not label]
        refuse("row", "without a label", empty, "Label every row, or none")
    splits = [split for table in tables for split in _read_splits(table)]
    columns = zip(make_path_ids(paths), read_labels(labels), splits, paths, places, strict=True)
    return [Annotation(name, label, split, path, place=place) for name, label, split, path, place in columns]


def _escapes(path: str) -> bool:
    # Lists come from anywhere: one must not make the job read what lies outside of the folder it was given.
    drive = re.match(r"[A-Za-z]:/", path)
    return bool(drive) or not path or path.startswith("/") or "://" in path or "\0" in path or ".." in path.split("/")


def _read_kinetics(table: _CsvTable) -> Iterator[Annotation]:
    places, names = table.places(), table.column("youtube_id")
    empty = [place for place, name in zip(places, names, strict=True) if not name]
    refuse("row", "without a youtube_id", empty, "Fill the column")
    columns = (names, read_labels(table.column("label")), _read_splits(table), _read_spans(table), places)
    for video, label, split, (start, end, text), place in zip(*columns, strict=True):
        # The span is part of the id: several clips may be of one YouTube video.
        trimmed = f"{video}_{text}"
        yield Annotation(make_id(trimmed), label, split, "", trimmed, video, start, end, place)


def _format_seconds(seconds: float) -> str:
    # As the downloaders of Kinetics name what they cut: ID_000017_000027.mp4.
    return f"{int(seconds):06d}" if seconds.is_integer() else f"{seconds:010.3f}"


def _read_spans(table: _CsvTable) -> list[tuple[float, float, str]]:
    """Start and end in seconds, and both as the names of trimmed files have them.

    One that holds no time costs its video, which the decoder will refuse; a table of nothing else is refused here.
    """
    spans, wrong, empty = [], [], []
    for place, *text in zip(table.places(), table.column("time_start"), table.column("time_end"), strict=True):
        span = _read_span(*text)
        if span is None:
            wrong.append(f"{place} {','.join(text)!r}")
            spans.append((*_NO_SPAN, "_".join(text)))
            continue
        if not 0 <= span[0] < span[1]:
            empty.append(f"{place} {span[0]:g}–{span[1]:g}")
        spans.append((*span, "_".join(map(_format_seconds, span))))
    if len(wrong) + len(empty) == len(spans):
        refuse("span", "other than two numbers", wrong, "time_start and time_end are seconds, such as 17 or 17.5")
        refuse("negative, empty or reversed span", "", empty, "0 ≤ time_start < time_end is needed, in seconds")
    elif wrong or empty:
        count, first = len(wrong) + len(empty), (wrong + empty)[0]
        logger.warning("%d rows of %s have a span that holds no time, such as %s: they will be quarantined",
                       count, table.name, first)  # fmt: skip
    return spans


def _read_span(start: str, end: str) -> tuple[float, float] | None:
    """Seconds; None where they are not two finite numbers."""
    try:
        span = float(start), float(end)
    except ValueError:
        return None
    return span if all(map(math.isfinite, span)) else None


def _read_splits(table: _CsvTable) -> list[str]:
    splits = [read_split(split) for split in table.column("split", WHOLE)]
    check_splits(splits, table.places())
    return splits


def _read_class_list(names: dict[str, str]) -> tuple[str, ...]:
    lists = [name for name in names if re.search(r"(class|label).*\.txt$", name.lower())]
    if len(lists) > 1:
        raise CatalogError(f"several class lists: {', '.join(sorted(lists))}. Give one")
    return tuple(line for _, line in _read_lines(names[lists[0]])) if lists else ()


def _check_labels(rows: Iterable[Annotation], classes: tuple[str, ...]) -> tuple[str, ...]:
    """The class list, or where there is none the labels in use."""
    labels = [row.class_name for row in rows]
    if not classes:
        return order_classes(labels)
    remedy = f"The class list has {format_count(len(classes), 'class')}: {', '.join(classes[:5])}, …"
    refuse("unknown label", "", sorted(set(labels) - set(classes) - {""}), remedy)
    return classes


_HMDB_FILE = re.compile(r"(.+)_test_split(\d)\.txt")


def _read_ucf101(names: dict[str, str], fold: int) -> Annotations:
    classes = _read_class_index(names["classInd.txt"])
    rows: list[Annotation] = []
    wrong: list[str] = []
    for split in ("train", "test"):
        name = f"{split}list{fold:02d}.txt"
        if name not in names:
            lists = ", ".join(sorted(other for other in names if "list" in other))
            raise CatalogError(f"no {name} beside classInd.txt, where {lists or 'no list'} is. Choose fold 1, 2 or 3")
        for place, text in _read_lines(names[name]):
            # Lines of the train lists end with the class's number, those of the test lists do not.
            path, *number = text.replace("\\", "/").split()
            class_name, _, file_name = path.rpartition("/")
            position = str(classes.index(class_name) + 1) if class_name in classes else "none"
            if position not in (number or [position]) or position == "none":
                wrong.append(f"{place} {text!r}")
            rows.append(_row_of_file(file_name, class_name, split, place))
    refuse(
        "line",
        "with an unknown label",
        wrong,
        f"classInd.txt has {format_count(len(classes), 'class')}, such as {classes[0]}",
    )
    return Annotations(rows, classes, f"UCF-101 fold {fold}")


def _read_class_index(uri: str) -> tuple[str, ...]:
    lines = [line.split(maxsplit=1) for _, line in _read_lines(uri)]
    wrong = [" ".join(parts) for i, parts in enumerate(lines, 1) if len(parts) != 2 or parts[0] != str(i)]
    refuse("line", "out of place in classInd.txt", wrong, "Lines are '1 FirstClass', '2 SecondClass', … in order")
    if not lines:
        raise CatalogError("classInd.txt is empty. Lines such as '1 ApplyEyeMakeup' are needed")
    return tuple(name for _, name in lines)


def _read_hmdb51(names: dict[str, str], fold: int) -> Annotations:
    matches = [match for match in map(_HMDB_FILE.fullmatch, names) if match]
    classes = tuple(sorted({match[1] for match in matches}))
    absent = [f"{name}_test_split{fold}.txt" for name in classes if f"{name}_test_split{fold}.txt" not in names]
    refuse("split file", "absent", absent, f"Choose a fold of {', '.join(sorted({match[2] for match in matches}))}")
    rows: list[Annotation] = []
    wrong: list[str] = []
    for class_name in classes:
        file = f"{class_name}_test_split{fold}.txt"
        for place, text in _read_lines(names[file]):
            # From the right: a file's name may hold spaces.
            name, _, use = text.rpartition(" ")
            if not name or use not in ("0", "1", "2"):
                wrong.append(f"{place} {text!r}")
            elif use != "0":
                rows.append(_row_of_file(name.strip(), class_name, "train" if use == "1" else "test", place))
    refuse("unreadable line", "", wrong, "Lines are 'NAME.avi N' with 0 = unused, 1 = train, 2 = test")
    return Annotations(rows, classes, f"HMDB-51 fold {fold}")


def _row_of_file(name: str, class_name: str, split: str, place: str) -> Annotation:
    stem = posixpath.splitext(name)[0]
    # By path first, by name alone where the folder is laid out otherwise.
    return Annotation(make_id(stem), class_name, split, f"{class_name}/{name}", "", stem, place=place)
