"""report.html of an output of features: what came out, what was lost and why, and how it was made, on one page."""

from __future__ import annotations

from collections.abc import Sequence

import markupsafe
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import records, storage
from pipelines.datasets import shards
from pipelines.extraction.records import ExtractionRun
from pipelines.features.records import FeatureSet
from pipelines.pages import plotting
from pipelines.pages.base import make_environment, put_page
from pipelines.pages.class_coverage import STATUSES, Count
from pipelines.pages.extraction import (
    NUM_OPEN_QUARANTINED,
    NUM_QUARANTINED,
    NUM_RUNS,
    describe_videos,
    order_splits,
    read_runs,
)

COLUMNS = (
    *("id", "split", "status", "stage", "error_kind", "error_message"),
    *("fps", "num_frames", "height", "width", "timing", "partial", "windows"),
)


def write_features_report(output: str, found: FeatureSet) -> str:
    """Make report.html of an output and put it there; returns its URI.

    `found` is what features.json holds or is about to hold; videos.parquet must be in place.
    """
    videos = shards.read_table(storage.join(output, "videos.parquet"), COLUMNS)
    return put_page(output, render_features(output, records.in_file_order(found), videos, runs=read_runs(output)))


def render_features(output: str, found: FeatureSet, videos: pa.Table, *, runs: Sequence[ExtractionRun] = ()) -> str:
    """The page as HTML. `videos`: the columns COLUMNS of videos.parquet, one row per catalog video."""
    usable = videos.filter(pc.equal(videos["status"], "ok"))
    seconds = pc.sum(pc.divide(pc.cast(usable["num_frames"], pa.float64()), usable["fps"])).as_py() or 0.0
    counts = (Count(**{name: getattr(split, name) for name in STATUSES}) for split in found.splits.values())
    timelines = [run.timeline for run in runs if run.frames and run.timeline[-1][0] > 0]
    plots = {"throughput": markupsafe.Markup(plotting.plot_throughput(timelines))} if timelines else {}
    return (
        make_environment()
        .get_template("features.html.j2")
        .render(
            output=output,
            found=found,
            runs=runs,
            splits=order_splits(found.splits),
            total=sum(counts, Count()),
            hours=seconds / 3600,
            facts=describe_videos(usable) | _describe_windows(usable),
            plots=plots,
            quarantined=videos.filter(pc.equal(videos["status"], "quarantined")).slice(0, NUM_QUARANTINED).to_pylist(),
            num_open_quarantined=NUM_OPEN_QUARANTINED,
            num_runs=NUM_RUNS,
        )
    )


def _describe_windows(usable: pa.Table) -> dict[str, str]:
    if not len(usable):
        return {}
    low, middle, high = pc.quantile(usable["windows"], q=[0, 0.5, 1]).to_pylist()
    return {"Windows a video": f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}"}
