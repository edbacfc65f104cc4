"""report.html of an evaluation: figures, the worst classes with their mistakes to look at, and the confusion matrix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import markupsafe
import numpy as np
import pyarrow as pa

from pipelines import records, storage
from pipelines.datasets import shards
from pipelines.evaluation.records import Evaluation
from pipelines.pages import plotting
from pipelines.pages.base import NUM_OPEN_CLASSES, make_environment, put_page
from pipelines.pages.mistakes import Mistake, collect_mistakes
from pipelines.pages.preview import draw_wheel

NUM_TAKEN_FOR = 3  # other classes that are named for each
NUM_PAIRS = 15  # of classes that are taken for each other
NUM_NUMBERED = 24  # classes up to which the matrix is a table of numbers; beyond, a picture


def write_evaluation_report(output: str, evaluation: Evaluation) -> str:
    """Write report.html of what evaluation.json holds and scores.parquet, which must be in place; returns its URI.

    Clips come from the shards that were evaluated, and are left out where these are not there any more.
    """
    evaluation = records.in_file_order(evaluation)
    uri = storage.join(output, "scores.parquet")
    if not storage.exists(uri):
        return put_page(output, render_evaluation(output, evaluation, None, None))
    scores = shards.read_table(uri)
    mistakes = collect_mistakes(evaluation.data, scores, evaluation.classes)
    return put_page(output, render_evaluation(output, evaluation, scores, mistakes))


def render_evaluation(
    output: str, evaluation: Evaluation, scores: pa.Table | None, mistakes: Sequence[Mistake] | None
) -> str:
    """The page as HTML, from what evaluation.json and scores.parquet hold, and the mistakes to show (None: unknown)."""
    classes = evaluation.classes
    matrix = np.array(evaluation.confusion, np.int64)
    # The worst first; classes without videos last.
    rows = sorted(describe_classes(evaluation, scores), key=lambda row: (row.share is None, row.share, row.name))
    by_class = None
    if mistakes is not None:
        # They come class by class already, the worst class first.
        by_class = {name: list(few) for name, few in itertools.groupby(mistakes, lambda mistake: mistake.class_name)}
    plotted = len(classes) > NUM_NUMBERED and matrix.sum()
    return (
        make_environment()
        .get_template("evaluation.html.j2")
        .render(
            output=output,
            evaluation=evaluation,
            classes=rows,
            names=classes,
            mistakes=by_class,
            pairs=find_pairs(matrix, classes),
            confusion_plot=markupsafe.Markup(plotting.plot_confusion(matrix)) if plotted else None,
            figures={name: evaluation.figures[name] for name in sorted(evaluation.figures, key=_place_network)},
            settings=evaluation.settings,
            num_open_classes=NUM_OPEN_CLASSES,
            wheel=draw_wheel(160),
        )
    )


def _place_network(name: str) -> tuple[int, str]:
    return {"rgb": 0, "flow": 1, "fused": 3}.get(name, 2), name


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """A class's share of right videos, of how many (0: unknown), the lost ones, and what the others are taken for."""

    name: str
    share: float | None
    of: int
    lost: int
    taken_for: Sequence[tuple[str, int]]  # class and number of videos, the most frequent first


def describe_classes(evaluation: Evaluation, scores: pa.Table | None) -> list[ClassAccuracy]:
    """The accuracy of each class, in the order of the classes."""
    classes = evaluation.classes
    expected, lost = _count_videos(scores, len(classes))
    described = []
    for label, (name, counts) in enumerate(zip(classes, evaluation.confusion, strict=True)):
        others = sorted(((count, other) for other, count in zip(classes, counts, strict=True)), reverse=True)
        taken = [(other, count) for count, other in others if count and other != name]
        described.append(
            ClassAccuracy(
                name=name,
                share=evaluation.per_class[name],
                # A row of the matrix has the evaluated videos only.
                of=sum(counts) if evaluation.ignore_missing else expected[label],
                lost=lost[label],
                taken_for=taken[:NUM_TAKEN_FOR],
            )
        )
    return described


def _count_videos(scores: pa.Table | None, num_classes: int) -> tuple[list[int], list[int]]:
    """Expected and lost videos of each class; zeros where the scores are not known."""
    if scores is None:
        return [0] * num_classes, [0] * num_classes
    labels = np.asarray(scores["label"].to_numpy(), np.int64)
    gone = np.array([status != "ok" for status in scores["status"].to_pylist()], bool)
    return tuple(np.bincount(some, minlength=num_classes).tolist() for some in (labels, labels[gone]))


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """So many videos of one class, and the share of it that they are, were taken for another one."""

    true: str
    taken_for: str
    count: int
    share: float


def find_pairs(matrix: np.ndarray, classes: Sequence[str]) -> list[ConfusedPair]:
    """The classes that are most often taken for another one, the most frequent pair first; equal ones in order."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    # Stable: equal input must give equal bytes.
    places = np.argsort(-wrong, axis=None, kind="stable")[:NUM_PAIRS]
    pairs = [(int(place) // len(matrix), int(place) % len(matrix)) for place in places]
    return [
        ConfusedPair(
            true=classes[row],
            taken_for=classes[column],
            count=int(wrong[row, column]),
            share=float(wrong[row, column] / matrix[row].sum()),
        )
        for row, column in pairs
        if wrong[row, column]
    ]
