"""What an extraction says while it runs and when it is done, in lines that read well in `ray job logs` too."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipelines import records, storage
from pipelines.extraction.records import RUNS, ExtractionRun, TimelinePoint
from pipelines.formatting import format_bytes, format_seconds

if TYPE_CHECKING:
    from pipelines.datasets.records import Dataset, StoredFlowError, Totals
    from pipelines.extraction.estimate import Estimate
    from pipelines.extraction.graph import Placement, Remaining
    from pipelines.extraction.progress import Tally

# One module by four distributions, of which a machine may have any.
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
VERSIONS_OF = ("av", "numba", "numpy", *OPENCV, "pyarrow", "ray", "torch", "triton")
FULLY_BUSY = 0.8  # share of the time above which a GPU counts as the bottleneck; the rest is start and end of a run


class RunLog:
    """Prints progress lines, and writes OUT/runs/TIME.json: when, where and how fast, which the shards never say."""

    def __init__(self, *, shards: int) -> None:
        self.shards = shards
        self.videos_to_do = 0
        self.shards_left = shards
        self.started = time.time()
        self.timeline: list[TimelinePoint] = []
        self.nodes: dict[str, int] = {}
        self.gpu_share: float | None = None

    def update(self, remaining: Remaining) -> None:
        """Take note of a committed shard; the first call says what there is to do."""
        # The first call comes before any work: what is left then is what this start has to do.
        if not self.videos_to_do:
            self.videos_to_do = remaining.videos
            done = self.shards - remaining.shards
            print(
                f"to do       {remaining.shards} shards with {remaining.videos:,} videos; {done} shards are done",
                flush=True,
            )
        self.shards_left = remaining.shards

    def add(self, tally: Tally) -> None:
        """Print one progress line."""
        point = TimelinePoint(round(tally.seconds, 1), tally.videos, tally.frames, tally.quarantined)
        self.timeline.append(point)
        self.nodes = dict(tally.nodes)
        self.gpu_share = tally.gpu_share
        # A task that was repeated has counted its videos twice.
        left = max(0, self.videos_to_do - tally.videos)
        eta = format_seconds(left * tally.seconds / tally.videos) if tally.videos else "unknown"
        print(
            f"{format_seconds(tally.seconds):>9}  {tally.videos:,} of {self.videos_to_do:,} videos, "
            f"{tally.frames / tally.seconds:.0f} frames/s, ETA {eta}, {tally.quarantined:,} quarantined, "
            f"{self.shards_left} shards left{'' if tally.gpu_share is None else f', GPU {tally.gpu_share:.0%} busy'}",
            flush=True,
        )

    def write(self, output: str, placement: Placement) -> None:
        """Write the record of this run beside the shards; a run that found nothing to do leaves none.

        A storage that fails now has failed the run before: that error is the one to show.
        """

        if not self.timeline:
            return
        started = time.gmtime(self.started)
        run = ExtractionRun(
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
            seconds=round(time.time() - self.started, 1),
            host=socket.gethostname(),
            placement=asdict(placement),
            videos_by_node=self.nodes,
            gpu_share=self.gpu_share,
            versions={"python": platform.python_version(), **_find_versions()},
            timeline=tuple(self.timeline),
        )
        name = time.strftime("%Y%m%dT%H%M%SZ.json", started)
        with contextlib.suppress(OSError):
            records.write(storage.join(output, RUNS, name), run)


def _find_versions() -> dict[str, str]:
    # By distribution, without importing any: torch and Triton would take seconds.
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in VERSIONS_OF if name in installed}


def format_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Columns of text, the first aligned left, the others right."""
    cells = [list(header), *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        for row in cells
    )
    return "\n".join("  ".join(line) for line in lines)


def format_summary(dataset: Dataset, *, gpu_share: float | None = None) -> str:
    """The final table of an extraction, which says, where GPUs computed flow, which side waited for the other."""
    columns = ("expected", "ok", "missing", "quarantined", "frames")
    splits = [(name, *(getattr(counts, column) for column in columns)) for name, counts in dataset.splits.items()]
    parts = [format_table(("split", *columns), splits)]
    if dataset.quarantine_reasons:
        parts.append(format_table(("quarantined because", "videos"), sorted(dataset.quarantine_reasons.items())))
    if dataset.totals.frames:
        parts.append(_format_totals(dataset.totals, dataset.flow_error_px))
    if gpu_share is not None:
        # frames/s does not say which side waits for the other, and so which kind of machine to add.
        slower = "the GPUs are" if gpu_share >= FULLY_BUSY else "decoding and encoding on the CPUs is"
        parts.append(f"GPU         computed flow in {gpu_share:.0%} of the time: {slower} the bottleneck")
    return "\n" + "\n\n".join(parts) + "\n"


def _format_totals(totals: Totals, error: StoredFlowError | None) -> str:
    rgb, flow = totals.rgb_bytes, totals.flow_bytes
    lines = [
        f"RGB         {format_bytes(rgb)}, {format_bytes(rgb / totals.frames)} a frame",
        f"flow        {format_bytes(flow)}, {format_bytes(flow / max(1, totals.flow_frames))} a frame",
    ]
    if error:
        lines.append(
            f"flow error  {error.mean:.3f} px mean, {error.rms:.3f} RMS, {error.p999:.2f} p99.9, "
            f"{error.max:.2f} max, measured on {error.videos} videos"
        )
    return "\n".join(lines)


def format_estimate(estimate: Estimate, *, cpus: float, cpu_hour_price: float) -> str:
    """What --dry-run prints."""
    # As if all CPUs were busy to the end.
    low, mean, high = (s / cpus for s in (estimate.core_seconds_low, estimate.core_seconds, estimate.core_seconds_high))
    hours = estimate.core_seconds / 3600
    return (
        f"sampled     {estimate.sampled} of {estimate.videos:,} videos, {estimate.failed} of them failed\n"
        f"frames      {estimate.frames:,}\n"
        f"time        {format_seconds(mean)} on {cpus:g} CPUs ({format_seconds(low)} to {format_seconds(high)}, "
        f"if all were like the cheapest or dearest of the sample)\n"
        f"bytes       {format_bytes(estimate.num_bytes)}\n"
        f"cost        ${hours * cpu_hour_price:,.2f} for {hours:,.2f} CPU hours at ${cpu_hour_price:g}\n"
        "nothing was written"
    )
