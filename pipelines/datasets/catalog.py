"""Which videos exist, their label, split and span: annotations and one listing of the videos folder → one table.

A row whose file is absent stays, without a path, so that it can be counted as missing. Whatever would make a whole run
worthless (twice the same id, unknown labels, an empty split, no video at all) is an error here, before any work.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.datasets.annotations import Annotation, read_annotations, refuse
from pipelines.datasets.folders import Layout, annotate_folders
from pipelines.errors import CatalogError
from pipelines.formatting import format_count

# Of containers and raw streams that probe.py opens.
# fmt: off
VIDEO_EXTENSIONS = frozenset(
    {
        ".264", ".265", ".266", ".360", ".3g2", ".3gp", ".3gp2", ".3gpp", ".amv", ".apng", ".asf", ".avc", ".avi",
        ".dif", ".divx", ".dv", ".dvr-ms", ".evo", ".f4p", ".f4v", ".flv", ".gif", ".h261", ".h263", ".h264", ".h265",
        ".h266", ".hevc", ".insv", ".ismv", ".ivf", ".lrv", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2",
        ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mod", ".mov", ".mp2v", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpegts",
        ".mpg", ".mpv", ".mts", ".mxf", ".nsv", ".nut", ".obu", ".ogg", ".ogm", ".ogv", ".ogx", ".qt", ".rm", ".rmvb",
        ".rv", ".tod", ".tp", ".trp", ".ts", ".vc1", ".vob", ".vro", ".vvc", ".webm", ".wm", ".wmv", ".wtv", ".xvid",
        ".y4m",
    }
)
# fmt: on
# What browsers, yt-dlp, aria2, rsync and torrent clients call a file that is not whole yet.
_UNFINISHED = re.compile(
    r"\.(part(-frag\d+)?|crdownload|download|partial|opdownload|filepart|ytdl|aria2|!ut|!qb|tmp|temp)$"
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("split", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
    ]
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Catalog:
    """The videos of a run.

    `table` has one row per video, ordered by split (train, val, test, then others by name) and then
    shuffled in a fixed way, so that each part of a split holds all classes: `id`, `path`
    (absolute URI, null if the file is missing), `label` (-1 if unlabelled, with an empty `class_name`), `class_name`,
    `split`, `start` and `end` (seconds of the span to cut out, null for the whole file). `label` is a position in
    `classes`; `source` says in words which kind of annotation was recognised, `left_out` which files were passed over.
    """

    table: pa.Table
    classes: tuple[str, ...]
    source: str
    left_out: tuple[str, ...] = ()
    largest_bytes: int | None = None  # of a video file in the folder; None: not known

    def describe_classes(self) -> str:
        """`kick: 12, run: 7, wave: 9, … (5 in all); 2 without a label`: enough to see whether the labels are right."""
        counts = Counter(self.table["class_name"].to_pylist())
        parts = [f"{name}: {counts[name]:,}" for name in self.classes[:3]]
        more = f", … ({len(self.classes):,} in all)" if len(self.classes) > 3 else ""
        unlabelled = [f"{counts['']:,} without a label"] if counts[""] else []
        return "; ".join([*([", ".join(parts) + more] if parts else []), *unlabelled])

    def counts(self) -> pa.Table:
        """Rows per (split, class_name): columns `split`, `class_name`, `expected`, `present`, `missing`."""
        groups = self.table.group_by(["split", "class_name"], use_threads=False)
        counted = groups.aggregate([("id", "count"), ("path", "count")])
        counted = counted.rename_columns(["split", "class_name", "expected", "present"])
        missing = pc.subtract(counted["expected"], counted["present"])
        return counted.append_column("missing", missing).sort_by([("split", "ascending"), ("class_name", "ascending")])


def read_catalog(
    videos: str,
    annotations: str | Sequence[str] | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    fold: int = 1,
    layout: Layout = "auto",
) -> Catalog:
    """The catalog of a videos folder (or one video file), on disk or s3://.

    Without `annotations` the folders themselves tell class and split, as `layout` says (see folders.py); annotations.py
    says which kinds of files are recognised. `split` keeps one split; `limit` keeps at most that many videos, evenly
    spread over the rows whose file is there; `fold` is one of the three official divisions of UCF-101 and HMDB-51.
    Raises CatalogError, and OSError where the storage cannot be read.
    """
    if limit is not None and limit < 1:
        raise CatalogError(f"limit {limit}: at least 1 video is needed. Leave the limit out for all")
    folder, sizes = _list_folder(videos)
    paths = list(sizes)
    video_paths = [path for path in paths if _is_video(path)]
    if annotations is None:
        annotated = annotate_folders(video_paths, layout)
    elif layout != "auto":
        raise CatalogError(f"layout {layout} says what folders mean, and annotations are given: leave it out")
    else:
        sources = [annotations] if isinstance(annotations, str) else list(annotations)
        annotated = read_annotations(sources, fold=fold)
    rows = _order(annotated.rows, split)
    _warn_untrained(rows)
    table = _build_table(rows, _Files(paths), folder, annotated.classes)
    if table["path"].null_count == len(table):
        _refuse_no_videos(videos, paths, rows)
    left_out = _describe_others(paths)
    if annotations is not None and split is None:
        left_out += _describe_unnamed(video_paths, folder, table)
    known = [size for path in video_paths if (size := sizes[path]) is not None]
    return Catalog(_limit(table, limit), annotated.classes, annotated.source, left_out, max(known, default=None))


def _list_folder(videos: str) -> tuple[str, dict[str, int | None]]:
    """The absolute folder, and the sizes of all files in it by relative path, in order.

    One video file, whose size is not looked up, is a folder of one.
    """
    uri = storage.absolute(videos)
    if storage.is_dir(uri):
        sizes: dict[str, int | None] = {file.path: file.size for file in storage.list_files(uri)}
    elif storage.exists(uri):
        uri, _, name = uri.rpartition("/")
        sizes = {name: None}
    else:
        if storage.is_remote(uri):
            storage.check_answers(uri)  # a bucket that there is not, or that refuses, is another mistake
        raise CatalogError(f"no videos folder at {videos!r}. Check the path")
    unreadable = [repr(path) for path in sizes if _is_video(path) and not _is_utf8(path)]
    refuse("video file name", "in another encoding than UTF-8", unreadable, "Rename the files")
    return uri, sizes


def _describe_others(paths: Sequence[str]) -> tuple[str, ...]:
    """What is no video by its name, counted by ending, and what is the beginning of one."""
    others = [path for path in paths if not _is_video(path)]
    unfinished = [path for path in others if _UNFINISHED.search(path.lower())]
    kinds = Counter(posixpath.splitext(path)[1].lower() for path in set(others) - set(unfinished))
    said = []
    if kinds:
        named = ", ".join(f"{count:,} × {kind or 'no ending'}" for kind, count in _most_common(kinds))
        said.append(f"{format_count(kinds.total(), 'file')} without the ending of a video: {named}")
    if unfinished:
        said.append(f"{len(unfinished):,} unfinished downloads, such as {unfinished[0]}")
    return tuple(said)


def _most_common(kinds: Counter[str]) -> list[tuple[str, int]]:
    return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:8]


def _describe_unnamed(videos: Sequence[str], folder: str, table: pa.Table) -> tuple[str, ...]:
    """The videos that no row of the annotations took."""
    taken = set(table["path"].to_pylist())
    unnamed = [path for path in videos if storage.join(folder, path) not in taken]
    return (f"{format_count(len(unnamed), 'video')} that no annotation takes, such as {unnamed[0]}",) if unnamed else ()


def _is_video(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in VIDEO_EXTENSIONS


def _is_utf8(path: str) -> bool:
    # Python keeps the odd bytes of a file name as lone surrogates, which no table can hold.
    return not any("\ud800" <= character <= "\udfff" for character in path)


class _Files:
    """Finds a row's file among the listed ones without touching the storage again."""

    def __init__(self, paths: Sequence[str]) -> None:
        # One listing answers for all rows; to ask for each would be a request a video.
        self.paths = set(paths)
        self.by_stem: dict[str, list[str]] = {}
        for path in filter(_is_video, paths):
            self.by_stem.setdefault(posixpath.splitext(posixpath.basename(path))[0], []).append(path)

    def find(self, row: Annotation) -> tuple[str | None, bool]:
        """The file's relative path, None where it is missing, and whether it is cut to its span already."""
        if row.path in self.paths:
            return row.path, False
        trimmed = row.trimmed in self.by_stem
        candidates = self.by_stem.get(row.trimmed if trimmed else row.stem, [])
        wanted = _fold_name(row.class_name)
        # Two classes may have files of the same name.
        inside = (path for path in candidates if _fold_name(posixpath.basename(posixpath.dirname(path))) == wanted)
        return next(inside, candidates[0] if candidates else None), trimmed


def _fold_name(name: str) -> str:
    # Folders may have underscores for the spaces of a class's name.
    return name.replace(" ", "_").lower()


def _order(rows: Sequence[Annotation], split: str | None) -> list[Annotation]:
    _refuse_duplicates(rows)
    splits = {row.split for row in rows}
    _refuse_twin_splits(splits)
    if split is not None and split not in splits:
        raise CatalogError(f"split {split!r} has no rows. Choose one of {', '.join(sorted(splits)) or 'none: no rows'}")
    chosen = (row for row in rows if split in (None, row.split))
    return sorted(chosen, key=lambda row: (*split_rank(row.split), _scatter(row.id), row.id))


def _refuse_duplicates(rows: Sequence[Annotation]) -> None:
    twice = {name: [] for name, count in Counter(row.id for row in rows).items() if count > 1}  # type: dict[str, list[str]]
    for row in rows if twice else ():
        if row.id in twice:
            twice[row.id].append(row.place)
    named = [f"{name} ({', '.join(places[:3])}{', …' * (len(places) > 3)})" for name, places in twice.items()]
    refuse("duplicate id", "", named, "Every video may occur once over all splits: remove the repeated rows")


def _refuse_twin_splits(splits: set[str]) -> None:
    ways: dict[str, list[str]] = {}
    for split in sorted(splits):
        ways.setdefault(unicodedata.normalize("NFKC", split).casefold(), []).append(split)
    twins = [" and ".join(map(repr, same)) for same in ways.values() if len(same) > 1]
    refuse("split name", "written in two ways", twins, "They name files, which some disks take for one: rename one")


def split_rank(split: str) -> tuple[int, str]:
    """What splits are ordered by: train, val, test, then others by name."""
    return {"train": 0, "val": 1, "test": 2}.get(split, 3), split


def _scatter(name: str) -> bytes:
    # A fixed shuffle: in alphabetical order the ids of a folder per class would fill each shard with one class.
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _warn_untrained(rows: Sequence[Annotation]) -> None:
    trained = {row.class_name for row in rows if row.split == "train"}
    untrained = sorted({row.class_name for row in rows} - trained - {""})
    if trained and untrained:
        logger.warning("no train row for %s, such as %s", format_count(len(untrained), "class"), untrained[0])


def _build_table(rows: Sequence[Annotation], files: _Files, folder: str, classes: Sequence[str]) -> pa.Table:
    files_of_rows = [files.find(row) for row in rows]
    labels = {name: label for label, name in enumerate(classes)} | {"": -1}
    columns = {
        "id": [row.id for row in rows],
        "path": [path and storage.join(folder, path) for path, _ in files_of_rows],
        "label": [labels[row.class_name] for row in rows],
        "class_name": [row.class_name for row in rows],
        "split": [row.split for row in rows],
        # A file that is cut to its span begins at 0, and would be cut again.
        "start": [None if trimmed else row.start for row, (_, trimmed) in zip(rows, files_of_rows, strict=True)],
        "end": [None if trimmed else row.end for row, (_, trimmed) in zip(rows, files_of_rows, strict=True)],
    }
    return pa.table(columns, schema=SCHEMA)


def _limit(table: pa.Table, limit: int | None) -> pa.Table:
    if limit is None:
        return table
    present = table.filter(pc.is_valid(table["path"]))
    count = min(limit, len(present))
    # Spread evenly: the first ones would all be of one split.
    return present.take([i * len(present) // count for i in range(count)])


def _refuse_no_videos(videos: str, paths: Sequence[str], rows: Sequence[Annotation]) -> None:
    if not rows:
        others = "; ".join(_describe_others(paths))
        known = f"Known are .mp4, .mkv, .avi, .mov, .webm and {len(VIDEO_EXTENSIONS) - 5} others"
        contents = f"it holds {others}. {known}" if paths else "the folder is empty. Check the path"
        raise CatalogError(f"no videos in {videos!r}: {contents}")
    listed = format_count(len(paths), "file") + (f", such as {paths[0]}" if paths else "")
    first = rows[0]
    names = " or ".join(name for name in (first.path, first.trimmed, first.stem) if name)
    raise CatalogError(
        f"none of the {len(rows)} annotated videos is in {videos!r}: looked for {names} there, which holds {listed}. "
        "Give the folder that the annotation's names start from"
    )
