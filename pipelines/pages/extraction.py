"""report.html of an extraction: what came out, what was lost and why, and how the videos look, on one page.

The page is made from what the extraction wrote: videos.parquet, the shards (for the previews) and runs/*.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import markupsafe
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import records, storage
from pipelines.datasets import shards
from pipelines.datasets.records import Dataset, ShardConvention
from pipelines.datasets.shards import Row
from pipelines.extraction.records import RUNS, ExtractionRun
from pipelines.media.codec import scale_of
from pipelines.pages import plotting
from pipelines.pages.base import NUM_OPEN_CLASSES, make_environment, put_page
from pipelines.pages.class_coverage import Count, cover_classes, group_troubles
from pipelines.pages.preview import Card, choose_videos, draw_wheel, make_cards

NEAR_STATIC_PX = 0.1  # mean |flow| below this, on top of what stored zeros read as: hardly anything moves
HEAVILY_CLIPPED = 0.01  # share of flow values beyond the bound above which a video is listed
LOW_RATE = 0.99  # of the sampling rate: below it frames are repeated; measured rates are off by a little
NUM_QUARANTINED = 100
NUM_SUSPECTS = 20  # of each kind
NUM_OPEN_QUARANTINED = 15
NUM_RUNS = 20
NUM_NAMED = 4  # classes of each kind of trouble that the head of the page names

COLUMNS = (
    *("id", "class_name", "split", "status", "shard", "source", "stage", "error_kind", "error_message"),
    *("fps", "source_fps", "num_frames", "height", "width", "timing", "partial", "rgb_bytes", "flow_bytes"),
    *("flow_mean", "flow_clipped", "flow_error_mean", "flow_error_rms", "flow_error_p999", "flow_error_max"),
)
_SPLIT_ORDER = {"train": 0, "val": 1, "test": 2}
_ERROR_LABELS = {"mean": "mean", "rms": "RMS", "p999": "99.9%", "max": "max"}


def write_extraction_report(output: str, dataset: Dataset) -> str:
    """Make report.html of an output and put it there; returns its URI.

    `dataset` is what dataset.json holds or is about to hold; videos.parquet and the shards must be in place.
    """
    dataset = records.in_file_order(dataset)
    videos = shards.read_table(storage.join(output, "videos.parquet"), COLUMNS)
    chosen = choose_videos(videos, still_px=find_still_px(dataset.convention), clipped_share=HEAVILY_CLIPPED)
    files = {Path(shard.file).stem: shard.file for shard in dataset.shards}
    cards = make_cards(output, files, chosen)
    return put_page(output, render_extraction(output, dataset, videos, runs=read_runs(output), cards=cards))


def find_still_px(convention: ShardConvention) -> float:
    """Px of mean |flow| below which a video counts as nearly static; a codec without a code for zero adds to it."""
    scale = scale_of(convention.flow)
    stored_zero = abs(round(scale.zero_code) - scale.zero_code) * scale.step
    return NEAR_STATIC_PX + math.hypot(stored_zero, stored_zero)


def read_runs(output: str) -> list[ExtractionRun]:
    """The records of all runs of the command, oldest first; none where none was left."""
    folder = storage.join(output, RUNS)
    if not storage.is_dir(folder):
        return []
    uris = [storage.join(folder, file.path) for file in storage.list_files(folder) if file.path.endswith(".json")]
    contents = zip(uris, storage.read_many(uris), strict=True)
    return [ExtractionRun.from_json(records.parse(data, uri), where=uri) for uri, data in contents]


def render_extraction(
    output: str,
    dataset: Dataset,
    videos: pa.Table,
    *,
    runs: Sequence[ExtractionRun] = (),
    cards: Sequence[Card] = (),
) -> str:
    """The page as HTML. `videos`: the columns COLUMNS of videos.parquet, one row per catalog video."""
    still_px = find_still_px(dataset.convention)
    usable = videos.filter(pc.equal(videos["status"], "ok"))
    classes = cover_classes(videos, dataset.classes, still_px)
    return (
        make_environment()
        .get_template("extraction.html.j2")
        .render(
            output=output,
            dataset=dataset,
            convention=dict(sorted(dataset.convention.to_json().items())),
            runs=runs,
            cards=cards,
            classes=classes,
            splits=order_splits(dataset.splits),
            total=sum((entry.total for entry in classes), Count()),
            widest={
                split: max(entry.splits.get(split, Count()).expected for entry in classes) for split in dataset.splits
            },
            # Not the 95% of the liveliest class: one outlier would press all the others against zero.
            liveliest=max((1.2 * entry.motion[3] for entry in classes if entry.motion), default=0) or 1.0,
            hours=float((_values(usable, "num_frames") / _values(usable, "fps")).sum() / 3600),
            facts=describe_videos(usable),
            plots=_plot_all(usable, runs, still_px),
            quarantined=videos.filter(pc.equal(videos["status"], "quarantined")).slice(0, NUM_QUARANTINED).to_pylist(),
            suspects=find_suspects(usable, still_px),
            still_px=still_px,
            wheel=draw_wheel(160),
            troubles=group_troubles(classes),
            num_named=NUM_NAMED,
            num_open_classes=NUM_OPEN_CLASSES,
            num_open_quarantined=NUM_OPEN_QUARANTINED,
            num_runs=NUM_RUNS,
        )
    )


def order_splits(names: Iterable[str]) -> list[str]:
    """train, val, test, then others by name."""
    return sorted(names, key=lambda name: (_SPLIT_ORDER.get(name, 3), name))


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Videos that look wrong in the same way: how many there are, and rows of videos.parquet of the worst."""

    count: int
    videos: list[Row]


def find_suspects(usable: pa.Table, still_px: float) -> dict[str, Suspects]:
    """Near-static, heavily clipped and low-rate videos: how many there are, and the worst of them."""
    kinds = {
        "still": (pc.less(usable["flow_mean"], still_px), [("flow_mean", "ascending")]),
        "clipped": (pc.greater(usable["flow_clipped"], HEAVILY_CLIPPED), [("flow_clipped", "descending")]),
        "low_rate": (
            pc.less(usable["source_fps"], pc.multiply(usable["fps"], LOW_RATE)),
            [("source_fps", "ascending")],
        ),
    }
    suspects = {}
    for name, (mask, order) in kinds.items():
        # By id where they are alike: equal input must give equal bytes.
        table = usable.filter(mask).sort_by([*order, ("id", "ascending")])
        suspects[name] = Suspects(count=len(table), videos=table.slice(0, NUM_SUSPECTS).to_pylist())
    return suspects


def describe_videos(usable: pa.Table) -> dict[str, str]:
    """Plain facts about the usable videos, name → sentence."""
    if len(usable) == 0:
        return {}
    low, middle, high = np.quantile(_values(usable, "num_frames"), [0, 0.5, 1])
    slowest, usual, fastest = (f"{rate:.4g}" for rate in np.quantile(_values(usable, "fps"), [0, 0.5, 1]))
    # Threads would give the groups in another order each time.
    sizes = usable.group_by(["width", "height"], use_threads=False).aggregate([([], "count_all")])
    common = sizes.sort_by([("count_all", "descending"), ("width", "ascending"), ("height", "ascending")]).to_pylist()
    shown = ", ".join(f"{row['width']}×{row['height']} ({row['count_all']:,})" for row in common[:3])
    by_order = pc.sum(pc.equal(usable["timing"], "order")).as_py() or 0
    return {
        "Frames a video": f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}",
        "Frames a second": usual if slowest == fastest else f"{slowest} to {fastest}, median {usual}",
        "Frame sizes": shown + (f" and {len(common) - 3:,} others" if len(common) > 3 else ""),
        "Timestamps unusable": f"{by_order:,} (frames taken by decode order)",
        "Decoded in part": f"{pc.sum(usable['partial']).as_py() or 0:,}",
    }


def _values(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    return np.asarray(table[name].drop_null().to_numpy(), np.float64)


def _plot_all(usable: pa.Table, runs: Sequence[ExtractionRun], still_px: float) -> dict[str, markupsafe.Markup]:
    """The plots there are numbers for; they hold no text of the data, so they alone go into the page unescaped."""
    plots: dict[str, str] = {}
    # A run that ended before its first line has no speed.
    timelines = [run.timeline for run in runs if run.frames and run.timeline[-1][0] > 0]
    if timelines:
        plots["throughput"] = plotting.plot_throughput(timelines)
    if len(usable):
        plots["motion"] = plotting.plot_motion(_values(usable, "flow_mean"), still_px)
        plots["clipped"] = plotting.plot_clipped(_values(usable, "flow_clipped"))
        frames = _values(usable, "num_frames")
        # A video of one frame has no flow; its zero bytes are divided by 1.
        flow_frames = np.maximum(frames - 1, 1)
        rgb_kb = _values(usable, "rgb_bytes") / frames / 1000
        flow_kb = _values(usable, "flow_bytes") / flow_frames / 1000
        plots["bytes"] = plotting.plot_bytes({"RGB": rgb_kb, "flow": flow_kb})
    errors = {label: _values(usable, f"flow_error_{name}") for name, label in _ERROR_LABELS.items()}
    if len(errors["mean"]):
        plots["error"] = plotting.plot_error(errors)
    return {name: markupsafe.Markup(svg) for name, svg in plots.items()}
