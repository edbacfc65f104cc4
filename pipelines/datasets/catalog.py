"""Which videos exist, their label, split and span: annotations and one listing of the videos folder → one table.

A row whose file is absent stays, without a path, so that it can be counted as missing. Whatever would make a whole run
worthless (twice the same id, unknown labels, an empty split, no video at all) is an error here, before any work.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.datasets.annotations import Annotation, annotate_folders, read_annotations, refuse
from pipelines.errors import CatalogError

# fmt: off
VIDEO_EXTENSIONS = frozenset(
    {
        ".264", ".265", ".3g2", ".3gp", ".apng", ".asf", ".avi", ".dv", ".f4v", ".flv", ".gif", ".h264",
        ".h265", ".hevc", ".ivf", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg",
        ".mpg", ".mts", ".mxf", ".obu", ".ogg", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv",
        ".y4m",
    }
)
# fmt: on
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
    `classes`; `source` says in words which kind of annotation was recognised.
    """

    table: pa.Table
    classes: tuple[str, ...]
    source: str

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
) -> Catalog:
    """The catalog of a videos folder (or one video file), on disk or s3://.

    Without `annotations` the folders themselves tell class and split; see annotations.py for the kinds of files and
    folders that are recognised. `split` keeps one split; `limit` keeps at most that many videos, evenly spread over the
    rows whose file is there; `fold` is one of the three official divisions of UCF-101 and HMDB-51. Raises CatalogError.
    """
    if limit is not None and limit < 1:
        raise CatalogError(f"limit {limit}: at least 1 video is needed. Leave the limit out for all")
    folder, paths = _list_folder(videos)
    if annotations is None:
        annotated = annotate_folders([path for path in paths if _is_video(path)])
    else:
        sources = [annotations] if isinstance(annotations, str) else list(annotations)
        annotated = read_annotations(sources, fold=fold)
    rows = _order(annotated.rows, split)
    _warn_untrained(rows)
    table = _build_table(rows, _Files(paths), folder, annotated.classes)
    if table["path"].null_count == len(table):
        _refuse_no_videos(videos, paths, rows)
    return Catalog(_limit(table, limit), annotated.classes, annotated.source)


def _list_folder(videos: str) -> tuple[str, list[str]]:
    """The absolute folder and the relative paths of all files in it, in order; one video file is a folder of one."""
    uri = storage.absolute(videos)
    if storage.is_dir(uri):
        paths = [file.path for file in storage.list_files(uri)]
    elif storage.exists(uri):
        uri, _, name = uri.rpartition("/")
        paths = [name]
    else:
        raise CatalogError(f"no videos folder at {videos!r}. Check the path")
    unreadable = [repr(path) for path in paths if _is_video(path) and not _is_utf8(path)]
    refuse("video file names that are not UTF-8", unreadable, "Rename the files")
    others = Counter(posixpath.splitext(path)[1].lower() for path in paths if not _is_video(path))
    if others:
        kinds = ", ".join(f"{count} × {kind or 'no extension'}" for kind, count in others.most_common(5))
        logger.info("%d files in %s are not videos by extension: %s", others.total(), videos, kinds)
    return uri, paths


def _is_video(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in VIDEO_EXTENSIONS


def _is_utf8(path: str) -> bool:
    # Python keeps the odd bytes of a file name as lone surrogates, which no table can hold.
    return not any("\ud800" <= character <= "\udfff" for character in path)


class _Files:
    """Finds a row's file among the listed ones without touching the storage again."""

    def __init__(self, paths: Sequence[str]) -> None:
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
        inside = (path for path in candidates if _fold_name(posixpath.basename(posixpath.dirname(path))) == wanted)
        return next(inside, candidates[0] if candidates else None), trimmed


def _fold_name(name: str) -> str:
    return name.replace(" ", "_").lower()


def _order(rows: Sequence[Annotation], split: str | None) -> list[Annotation]:
    twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    refuse("duplicate ids", twice, "Every video may occur once over all splits: remove the repeated rows")
    splits = {row.split for row in rows}
    if split is not None and split not in splits:
        raise CatalogError(f"split {split!r} has no rows. Choose one of {', '.join(sorted(splits)) or 'none: no rows'}")
    kept = (row for row in rows if split in (None, row.split))
    return sorted(kept, key=lambda row: (*split_rank(row.split), _scatter(row.id), row.id))


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
        logger.warning("%d classes have no train row, such as %s", len(untrained), untrained[0])


def _build_table(rows: Sequence[Annotation], files: _Files, folder: str, classes: Sequence[str]) -> pa.Table:
    found = [files.find(row) for row in rows]
    labels = {name: label for label, name in enumerate(classes)} | {"": -1}
    columns = {
        "id": [row.id for row in rows],
        "path": [path and storage.join(folder, path) for path, _ in found],
        "label": [labels[row.class_name] for row in rows],
        "class_name": [row.class_name for row in rows],
        "split": [row.split for row in rows],
        "start": [None if trimmed else row.start for row, (_, trimmed) in zip(rows, found, strict=True)],
        "end": [None if trimmed else row.end for row, (_, trimmed) in zip(rows, found, strict=True)],
    }
    return pa.table(columns, schema=SCHEMA)


def _limit(table: pa.Table, limit: int | None) -> pa.Table:
    if limit is None:
        return table
    present = table.filter(pc.is_valid(table["path"]))
    count = min(limit, len(present))
    return present.take([i * len(present) // count for i in range(count)])


def _refuse_no_videos(videos: str, paths: Sequence[str], rows: Sequence[Annotation]) -> None:
    found = f"{len(paths)} files" + (f", such as {paths[0]}" if paths else "")
    if not rows:
        raise CatalogError(f"no videos in {videos!r} ({found}). Known are {' '.join(sorted(VIDEO_EXTENSIONS))}")
    first = rows[0]
    names = " or ".join(name for name in (first.path, first.trimmed, first.stem) if name)
    raise CatalogError(
        f"none of the {len(rows)} annotated videos is in {videos!r}: looked for {names} there, which holds {found}. "
        "Give the folder that the annotation's names start from"
    )
