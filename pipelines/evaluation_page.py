"""report.html of an evaluation: figures, classes from the worst on, and the confusion matrix, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from pipelines import report_plots
from pipelines.report import NUM_OPEN_CLASSES, make_environment, put_page

NUM_TAKEN_FOR = 3  # other classes that are named for each


def write_evaluation_report(output: str, found: Mapping[str, Any]) -> str:
    """Write report.html of what evaluation.json holds; returns its URI."""
    return put_page(output, render_evaluation(output, found, found["classes"]))


def render_evaluation(output: str, found: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The page as HTML, from what evaluation.json holds."""
    matrix = np.array(found["confusion"], np.int64)
    plots = {"confusion": markupsafe.Markup(report_plots.plot_confusion(matrix))} if matrix.sum() else {}
    rows = sorted(describe_classes(found, classes), key=lambda row: (row["share"] is None, row["share"], row["name"]))
    return (
        make_environment()
        .get_template("evaluation.html.j2")
        .render(
            output=output,
            found=found,
            classes=rows,
            names=classes,
            plots=plots,
            settings=found["settings"],
            num_open_classes=NUM_OPEN_CLASSES,
        )
    )


def describe_classes(found: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each class's accuracy and the classes that its videos are most often taken for, with how often."""
    described = []
    for label, counts in enumerate(found["confusion"]):
        others = sorted(((count, name) for name, count in zip(classes, counts, strict=True)), reverse=True)
        taken = [(name, count) for count, name in others if count and name != classes[label]]
        share = found["per_class"][classes[label]]
        described.append({"name": classes[label], "share": share, "taken_for": taken[:NUM_TAKEN_FOR]})
    return described
