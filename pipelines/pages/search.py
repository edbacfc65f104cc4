"""report.html of a sweep: the front of accuracy and cost, every trial's choices, what decided, and the settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from pipelines import storage
from pipelines.pages import plotting
from pipelines.pages.base import make_environment, put_page
from pipelines.search.space import describe_geometry, read_outcome
from pipelines.search.trials import Book, Trial
from pipelines.training.config import SCORE, Metrics


def write_sweep_report(output: str) -> str:
    """Make report.html of a finished sweep's folder; returns its URI. Raises ValueError where there is none."""
    found = read_outcome(output)
    settings = json.loads(storage.read_bytes(storage.join(output, "sweep.json")))
    trials = list(Book(output, found["paper"]["id"] if found["paper"] else "").trials.values())
    return put_page(output, render_sweep(output, settings, found, trials))


def render_sweep(output: str, settings: Mapping[str, Any], found: Mapping[str, Any], trials: Sequence[Trial]) -> str:
    """The page as HTML: what sweep.json, result.json and the trials' records hold."""
    states = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}
    return (
        make_environment()
        .get_template("sweep.html.j2")
        .render(
            output=output,
            found=found,
            trials=sorted(trials, key=lambda trial: (trial.state != "finished", -(trial.score or 0))),
            states=states,
            describe=describe_geometry,
            spread=lambda scores: statistics.stdev(scores) if len(scores) > 1 else None,
            plots={name: markupsafe.Markup(svg) for name, svg in _plot_all(found, trials).items()},
            settings=settings,
            flow=settings["run"]["model"].get("stream") == "flow",
        )
    )


def _plot_all(found: Mapping[str, Any], trials: Sequence[Trial]) -> dict[str, str]:
    finished = [trial for trial in trials if trial.state == "finished"]
    curved = [trial for trial in trials if trial.curve]
    best = next(index for index, trial in enumerate(finished) if trial.id == found["best"]["id"])
    names = [name for name in finished[0].geometry if len({trial.geometry[name] for trial in finished}) > 1]
    points = np.array([(trial.gflops, trial.score) for trial in finished], np.float64)
    on_front = {entry["id"] for entry in found["front"]}
    front = points[[trial.id in on_front for trial in finished]]
    paper = points[[found["paper"] is not None and trial.id == found["paper"]["id"] for trial in finished]]
    plots = {
        "front": plotting.plot_front(
            points, [trial.number for trial in finished], front[np.argsort(front[:, 0])], paper
        ),
        "curves": plotting.plot_curves(
            [_curve(trial.curve) for trial in curved],
            y="top-1, %",
            highlighted=next(index for index, trial in enumerate(curved) if trial.id == found["best"]["id"]),
        ),
    }
    if names:  # else there is one trial, or no choice
        columns = {name: [trial.geometry[name] for trial in finished] for name in names}
        plots["parallel"] = plotting.plot_parallel(columns, points[:, 1], best)
    return plots


def _curve(reports: Sequence[Metrics]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([report["step"] for report in reports]), 100 * np.array([report[SCORE] for report in reports])
