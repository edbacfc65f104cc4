"""Which videos a data set of shards holds and where each one lies: what training and evaluation choose from.

Read from `dataset.json` and `videos.parquet` alone; no shard is opened. Every video of the catalog is here, missing and
quarantined ones too, so that an evaluation can count them.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models.input_spec import FRAMES_PER_SECOND
from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.annotations import Annotation, is_id, read_annotations
from pipelines.datasets.records import FrameSampling, ListedShard, ShardConvention, read_dataset
from pipelines.errors import DataError
from pipelines.formatting import format_count

COLUMNS = (
    *("id", "label", "class_name", "split", "source", "status", "shard"),
    *("num_frames", "height", "width", "error_kind"),
)


@dataclass(frozen=True, kw_only=True)
class VideoIndex:
    """The videos of a data set, or some of them.

    `data` is its absolute URI, `given` what the user called it, for messages.
    `table` has one row per video: `COLUMNS`, and of a usable one `file` (its shard's URI), `version` (the shard's hash)
    and `row` (its place in the shard). `convention` says how RGB and flow are read, `sampling` at which rate and size
    frames were taken and flow was computed.
    """

    data: str
    table: pa.Table
    classes: tuple[str, ...]
    convention: ShardConvention
    sampling: FrameSampling
    given: str = ""

    def __len__(self) -> int:
        return len(self.table)

    def usable(self) -> VideoIndex:
        """The labelled videos that lie in shards."""
        usable = pc.and_(pc.equal(self.table["status"], "ok"), pc.greater_equal(self.table["label"], 0))
        return replace(self, table=self.table.filter(usable))

    def of_split(self, split: str) -> VideoIndex:
        """The videos of one split. Raises DataError, with the splits there are, where it has none."""
        videos = self.table.filter(pc.equal(self.table["split"], split))
        if not len(videos):
            splits = ", ".join(sorted(set(self.table["split"].to_pylist())))
            raise DataError(f"{self.given or self.data} has no split {split!r}: choose one of {splits}")
        return replace(self, table=videos)

    def row(self, index: int) -> dict[str, Any]:
        """One video as a dict."""
        return dict(self.table.slice(index, 1).to_pylist()[0])


def check_labels(index: VideoIndex) -> None:
    """DataError where no video of the index has a label, so that nothing can be learned from it or counted."""
    if not pc.any(pc.greater_equal(index.table["label"], 0)).as_py():
        raise DataError(
            f"{index.given or index.data} has no labels on {format_count(len(index), 'video')}: "
            f"extract it again from class "
            "folders or with --annotations, or give --annotations here"
        )


def read_index(data: str, *, agreeing: bool = True) -> VideoIndex:
    """The index of a finished data set, on disk or s3://.

    Raises DataError where there is none, and, for whoever must have them `agreeing`, where its files say different
    things about its shards.
    """
    given, data = data, storage.absolute(data)
    try:
        dataset = read_dataset(data)
        sampling = dataset.sampling
        table = shards.read_table(storage.join(data, "videos.parquet"), COLUMNS)
    except (ValueError, OSError) as error:
        # With the path as the user wrote it.
        raise DataError(str(error).replace(data, given)) from error
    _check_names(given, table["id"].to_pylist(), [shard.file for shard in dataset.shards])
    # videos.parquet names shards without folder and extension.
    listed = {posixpath.splitext(posixpath.basename(shard.file))[0]: shard for shard in dataset.shards}
    if agreeing:
        _check_listed(given, table, listed)
    return VideoIndex(
        data=data,
        table=_locate(table, data, listed),
        classes=dataset.classes,
        convention=dataset.convention,
        sampling=sampling,
        given=given,
    )


def check_trainable(index: VideoIndex, split: str) -> list[str]:
    """What whoever trains on a split should know before. Raises DataError where it holds nothing to learn from."""
    videos = index.of_split(split)
    usable = videos.usable()
    check_labels(videos)
    if not len(usable):
        fates = Counter(videos.table["status"].to_pylist())
        said = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
        raise DataError(
            f"{index.given or index.data}: no video of split {split!r} is in a shard: {said}. "
            "The extraction's report.html says why"
        )
    used = set(usable.table["class_name"].to_pylist())
    untrained = [name for name in index.classes if name not in used]
    notes = []
    if index.sampling.fps != FRAMES_PER_SECOND:
        notes.append(
            f"{index.given or index.data} holds {index.sampling.describe_rate()}; networks count clips in frames, as "
            f"of {FRAMES_PER_SECOND} a second, so theirs last longer or shorter here than in the paper"
        )
    if len(usable) == 1:
        notes.append("there is one video to train on: the network will only learn that one by heart")
    if len(used) == 1:
        notes.append(f"all videos to train on are of one class ({min(used)}): any network is right about them")
    elif untrained:
        has = "has" if len(untrained) == 1 else "have"
        notes.append(
            f"{len(untrained)} of {format_count(len(index.classes), 'class')} {has} no video to "
            f"train on, such as {untrained[0]}"
        )
    return notes


def _check_names(data: str, ids: Sequence[object], files: Sequence[str]) -> None:
    """DataError where a name would lead out of the folder that it is to lie in: shards come from anywhere."""
    wrong = [name for name in ids if not is_id(name)]
    wrong += [name for name in files if not re.fullmatch(r"shards/[\w-]+\.\w+", name)]
    if wrong:
        raise DataError(
            f"{data} was not written by jobs/extract_flow.py: {len(wrong)} names of videos or shards are not as that "
            f"makes them, such as {str(wrong[0])[:80]!r}. Extract again"
        )


def _check_listed(data: str, table: pa.Table, listed: Mapping[str, ListedShard]) -> None:
    """DataError where the table's videos are not those of the listed shards: one of both is of another moment."""
    rows = Counter(table.filter(pc.equal(table["status"], "ok"))["shard"].to_pylist())
    counts = {name: shard.rows for name, shard in listed.items()}
    if other := sorted(name for name in rows.keys() | counts.keys() if rows[name] != counts.get(name, 0)):
        raise DataError(
            f"{data}: videos.parquet and dataset.json differ about shard {other[0]}. If an extraction is under way "
            "there, wait for its end; else run its command again, which writes both anew"
        )


def _locate(table: pa.Table, data: str, listed: Mapping[str, ListedShard]) -> pa.Table:
    """The table with the file, version and row of each usable video; a shard's rows are in the table's order."""
    rows, places, uris, versions = Counter[str](), [], [], []
    for name, status in zip(table["shard"].to_pylist(), table["status"].to_pylist(), strict=True):
        usable = status == "ok" and name in listed
        uris.append(storage.join(data, listed[name].file) if usable else None)
        versions.append(listed[name].sha256 if usable else None)
        places.append(rows[name] if usable else None)
        # What was lost has no row in the shard, so the rows after it move up.
        rows[name] += usable
    located = {"file": (uris, pa.string()), "version": (versions, pa.string()), "row": (places, pa.int32())}
    for name, (values, kind) in located.items():
        table = table.append_column(name, pa.array(values, kind))
    return table


def with_fold(index: VideoIndex, annotations: Sequence[str], fold: int) -> VideoIndex:
    """The same videos under another division: the splits and labels of official annotation files.

    Videos are known by id or by the name of their source file. A video that the fold leaves out is left out; one that
    it names and the data set lacks is added as missing. Raises CatalogError for annotations that cannot be read.
    """
    annotated = read_annotations(annotations, fold=fold)
    places = _places(index.table)
    rows = [_find(places, row) for row in annotated.rows]
    labels = {name: label for label, name in enumerate(annotated.classes)}
    columns = index.table.take(pa.array(rows, pa.int64()))  # a null place takes a row of nulls
    division = {
        # A video keeps the id that its row of the shard has; the annotations' id is for those that have none.
        "id": [own or row.id for own, row in zip(columns["id"].to_pylist(), annotated.rows, strict=True)],
        "label": [labels.get(row.class_name, -1) for row in annotated.rows],
        "class_name": [row.class_name for row in annotated.rows],
        "split": [row.split for row in annotated.rows],
        "status": pc.fill_null(columns["status"], "missing").to_pylist(),
    }
    for name, values in division.items():
        field = columns.schema.field(name)
        columns = columns.set_column(columns.schema.get_field_index(name), field, pa.array(values, field.type))
    return replace(index, table=columns, classes=annotated.classes)


def _places(table: pa.Table) -> dict[str, int]:
    """Row numbers by id, and by the source's file name without folder and extension where only one file has it."""
    stems = [posixpath.splitext(posixpath.basename(source or ""))[0] for source in table["source"].to_pylist()]
    shared = Counter(stems)
    named = {stem: place for place, stem in enumerate(stems) if stem and shared[stem] == 1}
    # An id wins over the name of another video's file.
    return named | {name: place for place, name in enumerate(table["id"].to_pylist())}


def _find(places: Mapping[str, int], row: Annotation) -> int | None:
    return next((places[name] for name in (row.id, row.trimmed, row.stem) if name in places), None)
