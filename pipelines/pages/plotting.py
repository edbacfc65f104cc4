"""Plots of a report as inline SVG whose colours are CSS variables, so that they follow the reader's light or dark mode.

Only numbers are drawn, never text from the data. Equal numbers give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

Values = npt.NDArray[np.floating]

# Matplotlib wants colours, CSS wants variables: these stand for the variables until the SVG is written.
_INK, _MUTED, _GRID, _FIRST, _SECOND = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", _FIRST: "--first", _SECOND: "--second"}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "report",  # fixed, because the ids in the SVG follow from it
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
}
WIDE, NARROW = (9.0, 2.3), (4.4, 2.3)  # inches
OPACITIES = 8  # steps, of a confusion matrix
MOST_NUMBERED = 20  # points that still get their numbers
CLIPPED_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
_TIME_UNITS = ((2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def plot_throughput(runs: Sequence[Sequence[Sequence[float]]]) -> str:
    """Frames a second over the working time of all runs, one after another; a run is its timeline of (seconds, videos,
    frames, quarantined) since it began."""
    total = sum(run[-1][0] for run in runs)
    divisor, unit = next((size, name) for least, size, name in _TIME_UNITS if total >= least)
    figure, axes = _axes(WIDE, x=f"{unit} of work", y="frames/s")
    begun = 0.0
    for run in runs:
        edges, rate = _rates(np.asarray(run, np.float64), windows=max(1, round(90 * run[-1][0] / total)))
        axes.stairs(rate, (begun + edges) / divisor, color=_FIRST, fill=True, alpha=0.18, linewidth=0)
        axes.stairs(rate, (begun + edges) / divisor, color=_FIRST, linewidth=1.4, baseline=None)
        if begun:
            axes.axvline(begun / divisor, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        begun += run[-1][0]
    axes.set_xlim(0, total / divisor)
    axes.set_ylim(0)
    return _to_svg(figure, "Frames per second over the working time")


def _rates(timeline: Values, windows: int) -> tuple[Values, Values]:
    seconds, frames = np.append(0, timeline[:, 0]), np.append(0, timeline[:, 2])
    edges = np.linspace(0, seconds[-1], min(windows, len(timeline)) + 1)
    return edges, np.diff(np.interp(edges, seconds, frames)) / np.diff(edges)


def plot_motion(flow_mean: Values, near_static_px: float) -> str:
    """Histogram of mean |flow| a video, px, on a log axis; what is left of the dashed line is nearly still."""
    figure, axes = _axes(NARROW, x="mean |flow| of a video, px a frame", y="videos")
    # A log axis has no zero: the stillest videos stand in its lowest bin.
    floor = near_static_px / 5
    axes.hist(
        np.maximum(flow_mean, floor),
        _log_bins(np.append(flow_mean, near_static_px), floor),
        color=_FIRST,
        histtype="stepfilled",
    )
    axes.axvline(near_static_px, color=_SECOND, linewidth=1, linestyle=(0, (3, 2)))
    _log_axis(axes)
    return _to_svg(figure, "Histogram of the mean flow length per video")


def plot_bytes(per_frame: Mapping[str, Values]) -> str:
    """Histograms of kB a frame, one outline for each kind of blob, on a log axis."""
    figure, axes = _axes(NARROW, x="kB a frame", y="videos")
    per_frame = {name: values[values > 0] for name, values in per_frame.items()}  # a lone frame has no flow
    bins = _log_bins(np.concatenate(list(per_frame.values())), 1e-3)
    for (name, values), colour in zip(per_frame.items(), (_FIRST, _SECOND), strict=False):
        axes.hist(values, bins, color=colour, alpha=0.35, histtype="stepfilled")
        axes.hist(values, bins, color=colour, histtype="step", linewidth=1.4, label=name)
    _log_axis(axes)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, borderaxespad=0, labelcolor=_INK)
    return _to_svg(figure, "Histograms of the bytes per frame")


def plot_clipped(share: Values) -> str:
    """Videos by the share of their flow values that lie beyond the bound."""
    figure, axes = _axes(NARROW, x="flow values beyond the bound", y="videos")
    names = ["none", *(f"≤ {100 * edge:g}%" for edge in CLIPPED_EDGES[1:]), f"> {100 * CLIPPED_EDGES[-1]:g}%"]
    counts = np.bincount(np.searchsorted(CLIPPED_EDGES, share), minlength=len(names))
    axes.bar(names, counts, width=0.72, color=[_FIRST] * (len(names) - 2) + [_SECOND] * 2)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, max(1, counts.max() * 1.15))
    for place, count in enumerate(counts):
        axes.annotate(f"{count:,}", (place, count), (0, 2), textcoords="offset points", ha="center", color=_MUTED)
    return _to_svg(figure, "Videos by share of clipped flow values")


def plot_error(errors: Mapping[str, Values]) -> str:
    """Boxes (quartiles, whiskers from least to largest) of the sampled videos' flow error, px, on a log axis."""
    figure, axes = _axes(NARROW, x="error of stored flow, px", y="")
    line = {"color": _FIRST, "linewidth": 1.2}
    axes.boxplot(
        # A log axis has no zero.
        [np.maximum(values, 1e-3) for values in errors.values()],
        orientation="horizontal",
        whis=(0, 100),
        widths=0.5,
        patch_artist=True,
        boxprops={"facecolor": _FIRST, "alpha": 0.35, "linewidth": 0},
        medianprops={"color": _INK, "linewidth": 1.6},
        whiskerprops=line,
        capprops=line,
    )
    axes.set_yticks(range(1, len(errors) + 1), list(errors), color=_INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _log_axis(axes)
    return _to_svg(figure, "Flow error of the sampled videos")


def plot_confusion(matrix: npt.NDArray[np.integer]) -> str:
    """Shares of each row of a confusion matrix, as squares whose opacity grows with the root of the share.

    Squares of like opacity are one path, so that a matrix of hundreds of classes stays small; of so many classes a
    square is larger than its place, to be seen at all.
    """
    count = len(matrix)
    figure, axes = _axes((4.4, 4.4), x="taken for, class number", y="shows, class number")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    levels = np.ceil(OPACITIES * np.sqrt(shares)).astype(int)
    right = np.eye(count, dtype=bool)
    side = max(1.0, count / 160)
    for colour, where in ((_FIRST, right), (_SECOND, ~right)):
        for level in range(1, OPACITIES + 1):
            places = np.argwhere(where & (levels == level))
            if len(places):
                path = Path.make_compound_path(*[_square(float(column), float(row), side) for row, column in places])
                axes.add_patch(PathPatch(path, facecolor=colour, alpha=level / OPACITIES, linewidth=0))
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(mpl.ticker.MaxNLocator(8, integer=True))
    return _to_svg(figure, "Confusion matrix")


def _square(x: float, y: float, side: float) -> Path:
    low_x, low_y, high_x, high_y = x - side / 2, y - side / 2, x + side / 2, y + side / 2
    return Path([(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y), (low_x, low_y)], closed=True)


def plot_front(points: Values, numbers: Sequence[int], front: Values, paper: Values) -> str:
    """Top-1 over GFLOPs a video, (n, 2) rows (GFLOPs, share) of all trials with their numbers; (k, 2) of the joined
    front; (m, 2) of the ringed."""
    figure, axes = _axes(NARROW, x="GFLOPs of a test video", y="top-1, %")
    axes.scatter(points[:, 0], 100 * points[:, 1], s=22, color=_MUTED, alpha=0.6, linewidth=0)
    axes.plot(front[:, 0], 100 * front[:, 1], color=_FIRST, marker="o", markersize=5, linewidth=1.4)
    axes.scatter(paper[:, 0], 100 * paper[:, 1], s=90, facecolor="none", edgecolor=_SECOND, linewidth=1.6)
    if len(points) <= MOST_NUMBERED:
        for (gflops, score), number in zip(points, numbers, strict=True):
            axes.annotate(str(number), (gflops, 100 * score), (7, 4), textcoords="offset points", color=_MUTED, size=8)
    axes.margins(0.08, 0.12)
    _log_axis(axes)
    return _to_svg(figure, "Top-1 over GFLOPs a video")


def plot_parallel(columns: Mapping[str, Sequence[float | str]], scores: Values, best: int) -> str:
    """Parallel coordinates: an axis for each choice and for top-1, a line for each trial, the best one's thick."""
    figure, axes = _axes((9.0, 3.4), x="", y="")
    shown = {**columns, "top-1": list(scores)}
    places = np.empty((len(scores), len(shown)))
    for index, (name, values) in enumerate(shown.items()):
        if name == "top-1":
            low, high = float(scores.min()), float(scores.max())
            # All trials may have the same score.
            places[:, index] = (scores - low) / ((high - low) or 1)
            ticks = {f"{100 * low:.0f}%": 0.0, f"{100 * high:.0f}%": 1.0}
        else:
            # Numbers and words do not compare with each other.
            options = sorted(set(values), key=lambda value: (str(type(value)), value))
            places[:, index] = [options.index(value) / max(1, len(options) - 1) for value in values]
            # A learning rate has as many values as there are trials.
            labelled = options if len(options) <= 6 else [options[0], options[-1]]
            ticks = {
                value if isinstance(value, str) else f"{value:g}": options.index(value) / max(1, len(options) - 1)
                for value in labelled
            }
        axes.axvline(index, color=_GRID, linewidth=1)
        for text, place in ticks.items():
            axes.text(index + 0.04, place, text, color=_MUTED, fontsize=8, va="center")
    for line, good in zip(places, places[:, -1], strict=True):
        axes.plot(line, color=_FIRST, alpha=0.15 + 0.6 * float(good), linewidth=1)
    axes.plot(places[best], color=_SECOND, linewidth=2.2)
    axes.set_xticks(range(len(shown)), [name.replace("_", "\n") for name in shown], fontsize=8)
    axes.set_yticks([])
    axes.grid(visible=False)
    return _to_svg(figure, "Choices of each trial, and its top-1")


def plot_curves(curves: Sequence[tuple[Values, Values]], *, y: str, highlighted: int | None = None) -> str:
    """Lines over steps, (n,) and (n,) each; one may be in the second colour."""
    figure, axes = _axes(NARROW, x="steps", y=y)
    for index, (steps, values) in enumerate(curves):
        chosen = index == highlighted
        single = len(curves) == 1
        axes.plot(
            steps,
            values,
            color=_SECOND if chosen else _FIRST,
            alpha=1 if chosen or single else 0.4,
            linewidth=2 if chosen else 1.2,
            marker="o" if len(steps) < 30 else None,
            markersize=2.5,
        )
    axes.set_xlim(0)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    return _to_svg(figure, f"{y} over the steps")


def _axes(size: tuple[float, float], *, x: str, y: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        # Not by pyplot, which keeps every figure and chooses a window system.
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=y == "videos", steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _log_bins(values: Values, floor: float) -> list[float]:
    low, high = max(floor, float(values.min())), max(floor, float(values.max()))
    num_edges = int(np.clip(2 * np.sqrt(len(values)), 12, 40))
    return list(np.geomspace(low * 0.9, max(high, low * 2) * 1.1, num_edges))


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_xlim()
    # Powers of ten alone would leave an axis of one tick.
    if high / low < 30:
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def _to_svg(figure: Figure, label: str) -> str:
    sink = io.StringIO()
    with mpl.rc_context(_STYLE):
        # Without the date equal numbers give equal bytes; the background is the page's.
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    svg = sink.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # one id each a page: matplotlib numbers them anew in every figure
    svg = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
