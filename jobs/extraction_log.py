"""What an extraction says while it runs and when it is done, in lines that read well in `ray job logs` too."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipelines import records, storage
from pipelines.extraction.records import RUNS, ExtractionRun, TimelinePoint
from pipelines.formatting import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.datasets.records import Dataset, StoredFlowError, Totals
    from pipelines.extraction.estimate import Estimate
    from pipelines.extraction.tally import Tally
    from pipelines.extraction.tasks import Placement, Remaining

# One module by four distributions, of which a machine may have any.
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
VERSIONS_OF = ("av", "numba", "numpy", *OPENCV, "pyarrow", "ray", "torch", "triton")
LINE_S = 5.0  # between two lines of a log, or points of a record, at least
LIVE_LINE = "{n_fmt} of {total_fmt} videos |{bar:24}| {elapsed}{postfix}"
ETA_AFTER_VIDEOS, ETA_AFTER_S = 4, 10.0  # since the first videos came, before they say when the last will
NAMED_FAILURES = 3  # of the videos in quarantine
FULLY_BUSY = 0.8  # share of the time above which a GPU counts as the bottleneck; the rest is start and end of a run


class RunLog:
    """Shows progress, and writes OUT/runs/TIME.json: when, where and how fast, which the shards never say.

    On a terminal progress is one live line; in a log it is a line every few seconds at first, and every minute later.
    """

    def __init__(self, *, shards: int) -> None:
        self.shards = shards
        self.videos_to_do = 0
        self.shards_left = shards
        self.started = time.time()
        self.timeline: list[TimelinePoint] = []
        self.nodes: dict[str, int] = {}
        self.gpu_share: float | None = None
        self.first: Tally | None = None  # with a finished video: until then workers started
        self.printed_s = 0.0
        self.bar: tqdm[Any] | None = None

    @property
    def every_s(self) -> float:
        """Seconds after which a new tally is of use."""
        return 1.0 if sys.stdout.isatty() else LINE_S

    def update(self, remaining: Remaining) -> None:
        """Take note of a committed shard; the first call says what there is to do."""
        # The first call comes before any work: what is left then is what this start has to do.
        if not self.videos_to_do:
            self.videos_to_do = remaining.videos
            done = self.shards - remaining.shards
            print(
                f"to do       {format_count(remaining.shards, 'shard')} with "
                f"{format_count(remaining.videos, 'video')}; {format_count(done, 'shard')} done",
                flush=True,
            )
            if sys.stdout.isatty():
                self.bar = tqdm(total=remaining.videos, file=sys.stdout, bar_format=LIVE_LINE, leave=False)
        self.shards_left = remaining.shards

    def add(self, tally: Tally) -> None:
        """Show how far the run is."""
        self._note(TimelinePoint(round(tally.seconds, 1), tally.videos, tally.frames, tally.quarantined))
        self.nodes = dict(tally.nodes)
        self.gpu_share = tally.gpu_share
        self.first = self.first or (tally if tally.videos else None)
        if self.bar is not None:
            # A task that was repeated has counted its videos twice.
            self.bar.n = min(tally.videos, self.videos_to_do)
            self.bar.set_postfix_str(self._describe(tally))
        elif self._is_due(tally):
            self.printed_s = tally.seconds
            videos = f"{tally.videos:,} of {format_count(self.videos_to_do, 'video')}"
            print(f"{format_seconds(tally.seconds):>9}  {videos}, {self._describe(tally)}", flush=True)

    def _note(self, point: TimelinePoint) -> None:
        # A live line asks more often than a record needs.
        if len(self.timeline) > 1 and point.seconds - self.timeline[-2].seconds < LINE_S:
            self.timeline.pop()
        self.timeline.append(point)

    def _is_due(self, tally: Tally) -> bool:
        """Whether a log wants a line: not before the first video, then ever more rarely, and at the end."""
        if tally.videos >= self.videos_to_do:
            return True
        every_s = min(60.0, max(LINE_S, tally.seconds / 10)) if tally.videos else 60.0
        return tally.seconds - self.printed_s >= 0.99 * every_s

    def _describe(self, tally: Tally) -> str:
        parts = [f"{tally.frames / tally.seconds:.0f} frames/s"] if tally.frames else []
        left_s = self._estimate_seconds(tally)
        parts += [f"ETA {format_seconds(left_s)}"] if left_s is not None else []
        parts += [f"{tally.quarantined:,} quarantined"] if tally.quarantined else []
        parts += [f"{format_count(self.shards_left, 'shard')} left"]
        parts += [f"GPU {tally.gpu_share:.0%} busy"] if tally.gpu_share is not None else []
        return ", ".join(parts)

    def _estimate_seconds(self, tally: Tally) -> float | None:
        """Seconds to the end, by the videos since the first ones came; None as long as they say little."""
        if self.first is None:
            return None
        videos, seconds = tally.videos - self.first.videos, tally.seconds - self.first.seconds
        left = self.videos_to_do - tally.videos
        if left <= 0 or videos < ETA_AFTER_VIDEOS or seconds < ETA_AFTER_S:
            return None
        return left * seconds / videos

    def write(self, output: str, placement: Placement) -> None:
        """Write the record of this run beside the shards; a run that did nothing leaves none.

        A storage that fails now has failed the run before: that error is the one to show.
        """
        if self.bar is not None:
            self.bar.close()
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


def format_failures(quarantine: pa.Table, where: str) -> str:
    """The first videos in quarantine with their reasons, and where the rest stands."""
    named = quarantine.slice(0, NAMED_FAILURES).to_pylist()
    lines = [f"failed      {row['source']}: {row['error_message']} ({row['error_kind']})" for row in named]
    more = len(quarantine) - len(named)
    return "\n".join([*lines, f"            {f'and {more:,} more ' if more else ''}in {where}"]) + "\n"


def _format_totals(totals: Totals, error: StoredFlowError | None) -> str:
    rgb, flow = totals.rgb_bytes, totals.flow_bytes
    lines = [
        f"RGB         {format_bytes(rgb)}, {format_bytes(rgb / totals.frames)} a frame",
        f"flow        {format_bytes(flow)}, {format_bytes(flow / max(1, totals.flow_frames))} a frame",
    ]
    if error:
        lines.append(
            f"flow error  {error.mean:.3f} px mean, {error.rms:.3f} RMS, {error.p999:.2f} p99.9, "
            f"{error.max:.2f} max, measured on {format_count(error.videos, 'video')}"
        )
    return "\n".join(lines)


def format_estimate(estimate: Estimate, *, cpus: float, cpu_hour_price: float) -> str:
    """What --dry-run prints."""
    # As if all CPUs were busy to the end.
    low, mean, high = (s / cpus for s in (estimate.core_seconds_low, estimate.core_seconds, estimate.core_seconds_high))
    hours = estimate.core_seconds / 3600
    work = f"{hours:,.2f} hours" if hours >= 1 else format_seconds(estimate.core_seconds)
    return (
        f"sampled     {estimate.sampled} of {format_count(estimate.videos, 'video')}, "
        f"{estimate.failed} of them failed\n"
        f"frames      {estimate.frames:,}\n"
        f"time        {format_seconds(mean)} on {format_count(cpus, 'CPU')} ({format_seconds(low)} "
        f"to {format_seconds(high)}, "
        f"if all were like the cheapest or dearest of the sample)\n"
        f"bytes       {format_bytes(estimate.num_bytes)}\n"
        f"cost        {_format_cost(hours * cpu_hour_price)} for {work} of one CPU at ${cpu_hour_price:g} an hour\n"
        "nothing was written"
    )


def _format_cost(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 0.01 else "less than $0.01"
