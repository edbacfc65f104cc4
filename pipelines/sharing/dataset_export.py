"""Shards as a data set to share: the files that readers need, and a card by which Hugging Face's `datasets` reads them.

    OUT/shards/train-00000.parquet (or .tar), …
    OUT/videos.parquet      one row per catalog video, missing and quarantined ones too
    OUT/dataset.json        settings, conventions, classes, hashes
    OUT/README.md           the card

It is a data set of this project, which every job takes for --data. Shards on the same disk are links, not copies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipelines import storage
from pipelines.datasets.catalog import split_rank
from pipelines.datasets.records import DATASET, Dataset, ListedShard, read_dataset
from pipelines.errors import DataError
from pipelines.formatting import format_bytes, format_count
from pipelines.sharing import cards


def export_dataset(data: str, said: cards.Said, folder: Path) -> str:
    """Writes the folder; returns the card. `data` is the shards' absolute URI.

    Raises DataError where the data set is unfinished or holds no video.
    """
    dataset = read_dataset(data)
    if not dataset.shards:
        raise DataError(f"{data} holds no shard: there is nothing to share")
    card = describe_dataset(said, dataset)
    # dataset.json last, as in an extraction: whoever finds it finds all the others.
    for file in (*(shard.file for shard in dataset.shards), "videos.parquet", DATASET):
        storage.link_or_copy(storage.join(data, file), str(folder / file))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def describe_dataset(said: cards.Said, dataset: Dataset) -> str:
    """The card."""
    origin = f" of {said.dataset}" if said.dataset else ""
    sampling = dataset.sampling
    rows: list[tuple[object, ...]] = [("split", "videos", "missing", "quarantined", "frames")]
    rows += [
        (
            name,
            f"{split.ok:,} of {split.expected:,}",
            f"{split.missing:,}",
            f"{split.quarantined:,}",
            f"{split.frames:,}",
        )
        for name, split in dataset.splits.items()
    ]
    size = format_bytes(sum(shard.bytes for shard in dataset.shards))
    return cards.join_sections(
        [
            cards.front_matter(_metadata(said, dataset)),
            f"# {said.name}",
            f"RGB frames and TV-L1 optical flow{origin}, {format_count(len(dataset.classes), 'class')}, {size} in "
            f"{format_count(len(dataset.shards), 'shard')}, extracted by {cards.PROJECT}: {sampling.describe()}.",
            f"## Videos\n\n{cards.table(rows)}",
            _convention_section(dataset),
            f"## Load it\n\nWith Hugging Face `datasets` alone; `rgb` and `flow` are video files as bytes:\n\n"
            f"{cards.code(reading_code(said, dataset))}\n\nIn a checkout of {cards.PROJECT}, as frames and as pixels "
            f"of motion:\n\n{cards.code(decoding_code(said, dataset))}\n\nIts jobs take the folder for `--data`.",
            cards.licence_section(said.licence),
        ]
    )


def _metadata(said: cards.Said, dataset: Dataset) -> dict[str, object]:
    files = [{"split": hub_split(name), "path": pattern} for name, pattern in list_patterns(dataset.shards).items()]
    return {
        "license": said.licence,
        "pretty_name": said.name,
        "task_categories": ["video-classification"],
        "tags": ["video", "optical-flow", "action-recognition", cards.PROJECT, _format(dataset)],
        "size_categories": [cards.size_category(sum(shard.rows for shard in dataset.shards))],
        "configs": [{"config_name": "default", "data_files": files}],
    }


def _format(dataset: Dataset) -> str:
    return "webdataset" if dataset.shards[0].file.endswith(".tar") else "parquet"


def hub_split(name: str) -> str:
    """What a split is called on the hub, which knows letters, digits and underscores."""
    return re.sub(r"\W", "_", name)


def list_patterns(shards: Sequence[ListedShard]) -> dict[str, str]:
    """By split, train first, the files of it; digits after its name, or `train` would take `train-extra` too."""
    splits = sorted(
        {shard.split: shard.file.rpartition(".")[2] for shard in shards}.items(), key=lambda s: split_rank(s[0])
    )
    return {split: f"shards/{split}-[0-9]*.{ending}" for split, ending in splits}


def _convention_section(dataset: Dataset) -> str:
    flow = cards.table([("flow", ""), *dataset.convention.flow.items()])
    preset = ", ".join(
        f"{key} {value}" for key, value in dataset.convention.tvl1.items() if isinstance(value, str | int)
    )
    measured = dataset.flow_error_px
    error = (
        f" Stored flow differs from the computed one by {measured.mean:.3f} px in the mean "
        f"({format_count(measured.videos, 'video')})."
        if measured
        else ""
    )
    return (
        f"## Conventions\n\n{flow}\n\nTV-L1: {preset}.{error} Whoever reads codes by another convention reads a bias."
    )


def reading_code(said: cards.Said, dataset: Dataset) -> str:
    """The lines of the card that need no code of this project."""
    split = hub_split(next(iter(list_patterns(dataset.shards))))
    return f"""
from datasets import load_dataset
{cards.folder_code(said.repo, "dataset")}
rows = load_dataset(folder, split={split!r}, streaming=True)
print(next(iter(rows)).keys())
"""


def decoding_code(said: cards.Said, dataset: Dataset) -> str:
    """The lines of the card that decode the first video."""
    return f"""
from pipelines.datasets.shards import read_rows
from pipelines.media.codec import decode_flow, decode_rgb
{cards.folder_code(said.repo, "dataset")}
row = next(read_rows(f"{{folder}}/{dataset.shards[0].file}"))
rgb = decode_rgb(row["rgb"])  # (T, H, W, 3) uint8
flow = decode_flow(row["flow"], row["convention"].flow)  # (T - 1, H, W, 2), pixels
print(row["class_name"], rgb.shape, flow.shape)
"""
