"""report.html of an extraction: what came out, what was lost and why, and how the videos look, on one page.

The page is a single file without a link to the network, made from what the extraction wrote: videos.parquet,
the shards (for the previews) and runs/*.json. Equal input gives equal bytes. Whatever comes from the data (ids, class
names, error messages) is hostile until escaped, which the template does for everything but our own plots.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import report_plots, shards, storage
from pipelines.class_coverage import STATUSES, Count, cover_classes, group_troubles
from pipelines.codec import scale_of
from pipelines.preview import Card, choose_videos, draw_wheel, make_cards
from pipelines.shards import Row, to_json

PAGES = Path(__file__).parent / "pages"
NEAR_STATIC_PX = 0.1  # mean |flow| below this, on top of what stored zeros read as: hardly anything moves
HEAVILY_CLIPPED = 0.01  # share of flow values beyond the bound above which a video is listed
NUM_QUARANTINED = 100
NUM_SUSPECTS = 20  # of each kind
NUM_OPEN_CLASSES = 20  # the others unfold
NUM_OPEN_QUARANTINED = 15
NUM_RUNS = 20
NUM_NAMED = 4  # classes of each kind of trouble that the head of the page names

COLUMNS = (
    *("id", "class_name", "split", "status", "shard", "source", "stage", "error_kind", "error_message"),
    *("fps", "num_frames", "height", "width", "timing", "partial", "rgb_bytes", "flow_bytes"),
    *("flow_mean", "flow_clipped", "flow_error_mean", "flow_error_rms", "flow_error_p999", "flow_error_max"),
)
_SPLIT_ORDER = {"train": 0, "val": 1, "test": 2}
_ERROR_LABELS = {"mean": "mean", "rms": "RMS", "p999": "99.9%", "max": "max"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One start of the extraction command. `timeline`: (seconds, videos, frames, quarantined), adding up."""

    started: str
    host: str
    seconds: float
    timeline: Sequence[Sequence[float]] = ()
    placement: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return int(self.timeline[-1][2]) if self.timeline else 0

    @property
    def videos(self) -> int:
        return int(self.timeline[-1][1]) if self.timeline else 0


def write_extraction_report(output: str, dataset: Mapping[str, Any]) -> str:
    """Make report.html of an output and put it there; returns its URI.

    `dataset` is what dataset.json holds or is about to hold; videos.parquet and the shards must be in place.
    """
    dataset = json.loads(to_json(dataset))  # in the order in which it is read again
    videos = shards.read_table(storage.join(output, "videos.parquet"), COLUMNS)
    chosen = choose_videos(videos, still_px=find_still_px(dataset), clipped_share=HEAVILY_CLIPPED)
    files = {Path(shard["file"]).stem: shard["file"] for shard in dataset["shards"]}
    cards = make_cards(output, files, chosen)
    return put_page(output, render_extraction(output, dataset, videos, runs=read_runs(output), cards=cards))


def put_page(output: str, page: str) -> str:
    """Write a page as report.html of a folder; returns its URI. What is no Unicode in a name becomes a ?."""
    uri = storage.join(output, "report.html")
    storage.put(uri, page.encode(errors="replace"))
    return uri


def find_still_px(dataset: Mapping[str, Any]) -> float:
    """Px of mean |flow| below which a video counts as nearly static; a codec without a code for zero adds to it."""
    scale = scale_of(dataset["convention"]["flow"])
    stored_zero = abs(round(scale.zero_code) - scale.zero_code) * scale.step
    return NEAR_STATIC_PX + math.hypot(stored_zero, stored_zero)


def read_runs(output: str) -> list[Run]:
    """The records of all runs of the command, oldest first; none where none was left."""
    folder = storage.join(output, "runs")
    if not storage.is_dir(folder):
        return []
    uris = [storage.join(folder, file.path) for file in storage.list_files(folder) if file.path.endswith(".json")]
    names = Run.__dataclass_fields__
    records = map(json.loads, storage.read_many(uris))
    return [Run(**{name: value for name, value in record.items() if name in names}) for record in records]


def render_extraction(
    output: str, dataset: Mapping[str, Any], videos: pa.Table, *, runs: Sequence[Run] = (), cards: Sequence[Card] = ()
) -> str:
    """The page as HTML. `videos`: the columns COLUMNS of videos.parquet, one row per catalog video."""
    still_px = find_still_px(dataset)
    usable = videos.filter(pc.equal(videos["status"], "ok"))
    classes = cover_classes(videos, dataset["classes"], still_px)
    return (
        make_environment()
        .get_template("extraction.html.j2")
        .render(
            output=output,
            dataset=dataset,
            runs=runs,
            cards=cards,
            classes=classes,
            splits=sorted(dataset["splits"], key=lambda name: (_SPLIT_ORDER.get(name, 3), name)),
            total=sum((entry.total for entry in classes), Count()),
            widest={
                split: max(entry.splits.get(split, Count()).expected for entry in classes)
                for split in dataset["splits"]
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


def find_suspects(usable: pa.Table, still_px: float) -> dict[str, Row]:
    """Near-static and heavily clipped videos: how many there are, and the worst of them."""
    kinds = {
        "still": (pc.less(usable["flow_mean"], still_px), [("flow_mean", "ascending")]),
        "clipped": (pc.greater(usable["flow_clipped"], HEAVILY_CLIPPED), [("flow_clipped", "descending")]),
    }
    found = {}
    for name, (mask, order) in kinds.items():
        table = usable.filter(mask).sort_by([*order, ("id", "ascending")])
        found[name] = {"count": len(table), "videos": table.slice(0, NUM_SUSPECTS).to_pylist()}
    return found


def describe_videos(usable: pa.Table) -> dict[str, str]:
    """Plain facts about the usable videos, name → sentence."""
    if len(usable) == 0:
        return {}
    low, middle, high = np.quantile(_values(usable, "num_frames"), [0, 0.5, 1])
    sizes = usable.group_by(["width", "height"], use_threads=False).aggregate([([], "count_all")])
    common = sizes.sort_by([("count_all", "descending"), ("width", "ascending"), ("height", "ascending")]).to_pylist()
    shown = ", ".join(f"{row['width']}×{row['height']} ({row['count_all']:,})" for row in common[:3])
    by_order = pc.sum(pc.equal(usable["timing"], "order")).as_py() or 0
    return {
        "Frames a video": f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}",
        "Frame sizes": shown + (f" and {len(common) - 3:,} others" if len(common) > 3 else ""),
        "Timestamps unusable": f"{by_order:,} (frames taken by decode order)",
        "Decoded in part": f"{pc.sum(usable['partial']).as_py() or 0:,}",
    }


def _values(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    return np.asarray(table[name].drop_null().to_numpy(), np.float64)


def _plot_all(usable: pa.Table, runs: Sequence[Run], still_px: float) -> dict[str, markupsafe.Markup]:
    """The plots there are numbers for; they hold no text of the data, so they alone go into the page unescaped."""
    plots: dict[str, str] = {}
    timelines = [run.timeline for run in runs if run.frames and run.timeline[-1][0] > 0]
    if timelines:
        plots["throughput"] = report_plots.plot_throughput(timelines)
    if len(usable):
        plots["motion"] = report_plots.plot_motion(_values(usable, "flow_mean"), still_px)
        plots["clipped"] = report_plots.plot_clipped(_values(usable, "flow_clipped"))
        frames = _values(usable, "num_frames")
        flow_frames = np.maximum(frames - 1, 1)
        rgb_kb = _values(usable, "rgb_bytes") / frames / 1000
        flow_kb = _values(usable, "flow_bytes") / flow_frames / 1000
        plots["bytes"] = report_plots.plot_bytes({"RGB": rgb_kb, "flow": flow_kb})
    errors = {label: _values(usable, f"flow_error_{name}") for name, label in _ERROR_LABELS.items()}
    if len(errors["mean"]):
        plots["error"] = report_plots.plot_error(errors)
    return {name: markupsafe.Markup(svg) for name, svg in plots.items()}


def make_environment() -> jinja2.Environment:
    """Templates with the filters that all pages share; whatever they are given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "thousands": lambda number: f"{number:,}",
        "size": _format_bytes,
        "time": _format_seconds,
        "base64": lambda data: base64.b64encode(data).decode(),
        "plain": _plain,
        "flat": _flatten,
        "hours": lambda hours: _format_seconds(3600 * hours),
    }
    script = (PAGES / "previews.js").read_text()
    environment.globals |= {
        "found_count": lambda found: Count(**{name: found[name] for name in STATUSES}),
        "script": markupsafe.Markup(script),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment


def _format_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.3g} {unit}"


def _format_seconds(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _plain(text: object, most: int = 400) -> str:
    """Text of unknown origin on one line, without control characters, cut to `most` characters."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    return line if len(line) <= most else line[: most - 1] + "…"


def _flatten(value: object, name: str = "") -> dict[str, object]:
    """Nested settings as one level of dotted names; what lists hold has its number in the name, from 1."""
    if isinstance(value, (list, tuple)):
        if not any(isinstance(part, (list, tuple, Mapping)) for part in value):
            return {name: ", ".join(map(str, map(_round, value))) or "none"}
        value = dict(enumerate(value, 1))
    if not isinstance(value, Mapping):
        return {name: "not set" if value is None else _round(value)}
    parts = [_flatten(part, f"{name}.{key}" if name else str(key)) for key, part in value.items()]
    return {key: part for found in parts for key, part in found.items()}


def _round(value: object) -> object:
    """A number without the last digits of its arithmetic."""
    return float(f"{value:.8g}") if isinstance(value, float) else value
