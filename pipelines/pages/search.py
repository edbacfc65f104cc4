"""report.html of a search: the front of accuracy and cost, every trial's choices, what decided, and the settings."""

from __future__ import annotations

from collections.abc import Sequence

import markupsafe
import numpy as np

from pipelines import records, storage
from pipelines.pages import plotting
from pipelines.pages.base import make_environment, put_page
from pipelines.search.records import SETTINGS, Outcome, SearchSettings, Trial, TrialReport, read_outcome
from pipelines.search.space import describe_geometry
from pipelines.search.trials import Book


def write_search_report(output: str) -> str:
    """Make report.html of a finished search's folder; returns its URI. Raises RecordError where there is none."""
    outcome = read_outcome(output)
    settings = records.read(storage.join(output, SETTINGS), SearchSettings)
    trials = list(Book(output, outcome.paper.id if outcome.paper else "").trials.values())
    return put_page(output, render_search(output, settings, outcome, trials))


def render_search(output: str, settings: SearchSettings, outcome: Outcome, trials: Sequence[Trial]) -> str:
    """The page as HTML: what sweep.json, result.json and the trials' records hold."""
    states = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}
    return (
        make_environment()
        .get_template("search.html.j2")
        .render(
            output=output,
            outcome=outcome,
            trials=sorted(trials, key=lambda trial: (trial.state != "finished", -(trial.score or 0))),
            states=states,
            describe=describe_geometry,
            plots={name: markupsafe.Markup(svg) for name, svg in _plot_all(outcome, trials).items()},
            settings=dict(sorted(settings.to_json().items())),
            flow=settings.stream == "flow",
        )
    )


def _plot_all(outcome: Outcome, trials: Sequence[Trial]) -> dict[str, str]:
    finished = [trial for trial in trials if trial.state == "finished"]
    # Stopped trials too: where they were stopped is what the plot shows.
    curved = [trial for trial in trials if trial.curve]
    best = next(index for index, trial in enumerate(finished) if trial.id == outcome.best.id)
    names = [name for name in finished[0].geometry if len({trial.geometry[name] for trial in finished}) > 1]
    points = np.array([(trial.gflops, trial.score) for trial in finished], np.float64)
    on_front = {trial.id for trial in outcome.front}
    front = points[[trial.id in on_front for trial in finished]]
    paper = points[[outcome.paper is not None and trial.id == outcome.paper.id for trial in finished]]
    plots = {
        "front": plotting.plot_front(
            points, [trial.number for trial in finished], front[np.argsort(front[:, 0])], paper
        ),
        "curves": plotting.plot_curves(
            [_curve(trial.curve) for trial in curved],
            y="top-1, %",
            highlighted=next(index for index, trial in enumerate(curved) if trial.id == outcome.best.id),
        ),
    }
    if names:  # else there is one trial, or no choice
        columns = {name: [trial.geometry[name] for trial in finished] for name in names}
        plots["parallel"] = plotting.plot_parallel(columns, points[:, 1], best)
    return plots


def _curve(reports: Sequence[TrialReport]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([report.step for report in reports]), 100 * np.array([report.val_top1 for report in reports])
