"""The videos that an evaluation got wrong and a person should see: of the worst classes, those it was surest about."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.shards import Row
from pipelines.datasets.video_index import read_index
from pipelines.pages.preview import Preview, PreviewError, try_preview

logger = logging.getLogger(__name__)

NUM_CLASSES = 4
NUM_VIDEOS = 3  # of a class
NUM_FIRST = 3  # classes of each network that are shown, and the true one
FUSED = "fused"

Probabilities = Mapping[str, npt.NDArray[np.float64]]  # network → (classes,)


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A class, and what each network gives it, in 0 to 1; `first_of`: the networks that put it first."""

    name: str
    is_true: bool
    probabilities: Mapping[str, float]
    first_of: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A video that was taken for another class, what each network thought of it, and how it looks."""

    id: str
    class_name: str
    taken_for: str
    guesses: Sequence[Guess]
    preview: Preview | PreviewError


def choose_mistakes(scores: pa.Table, num_classes: int) -> list[Row]:
    """Rows of scores.parquet: up to NUM_VIDEOS mistakes of each of the NUM_CLASSES worst classes, the surest first.

    The worst class has the smallest share of right ones among its evaluated videos. Each row gets `probabilities`.
    Equal tables give the same choice.
    """
    evaluated = scores.filter(pc.equal(scores["status"], "ok"))
    # Where scores are not finite, a video was taken for no class: nothing can be said of why.
    wrong = evaluated.filter(pc.and_(pc.greater(evaluated["rank"], 0), pc.is_valid(evaluated["predicted"])))
    names = [name.removeprefix("logits_") for name in scores.column_names if name.startswith("logits_")]
    chosen: list[Row] = []
    for label in _worst_labels(evaluated):
        rows = wrong.filter(pc.equal(wrong["label"], label)).to_pylist()
        judged = [row | {"probabilities": weigh(row, names, num_classes)} for row in rows]
        chosen += sorted(judged, key=lambda row: (-_sureness(row), row["id"]))[:NUM_VIDEOS]
    return chosen


def _worst_labels(evaluated: pa.Table) -> list[int]:
    labels = np.asarray(evaluated["label"].to_numpy(), np.int64)
    total = np.bincount(labels)
    right = np.bincount(labels[np.asarray(evaluated["rank"].to_numpy()) == 0], minlength=len(total))
    # A class that lost no video has nothing to show.
    order = sorted(np.flatnonzero(right < total), key=lambda label: (right[label] / total[label], label))
    return [int(label) for label in order[:NUM_CLASSES]]


def weigh(row: Row, names: Sequence[str], num_classes: int) -> Probabilities:
    """The softmax of each network's logits, and of their sum where there are several."""
    logits = {name: np.asarray(row[f"logits_{name}"], np.float64).reshape(num_classes) for name in names}
    if len(names) > 1:
        logits[FUSED] = sum(logits.values(), np.zeros(num_classes))
    return {name: _softmax(values) for name, values in logits.items()}


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Less the largest, else exp would overflow.
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def _sureness(row: Row) -> float:
    """How much more probable the class that was said is than the true one, by all networks together."""
    # The last is that of all networks together, or of the only one.
    joint = list(row["probabilities"].values())[-1]
    return float(joint[row["predicted"]] - joint[row["label"]])


def list_guesses(row: Row, classes: Sequence[str]) -> list[Guess]:
    """The first few classes of each network and the true one, the most probable by all networks together first."""
    probabilities: Probabilities = row["probabilities"]
    orders = {name: np.argsort(-values, kind="stable") for name, values in probabilities.items()}
    labels = {int(label) for order in orders.values() for label in order[:NUM_FIRST]} | {row["label"]}
    joint = list(probabilities.values())[-1]
    return [
        Guess(
            name=classes[label],
            is_true=label == row["label"],
            probabilities={name: float(values[label]) for name, values in probabilities.items()},
            first_of=[name for name, order in orders.items() if order[0] == label],
        )
        for label in sorted(labels, key=lambda label: (-joint[label], label))
    ]


def collect_mistakes(data: str, scores: pa.Table, classes: Sequence[str]) -> list[Mistake]:
    """The chosen mistakes with their previews, read row by row from the shards of `data`.

    Shards that are not there any more cost the previews only.
    """
    chosen = choose_mistakes(scores, len(classes))
    previews = _preview_all(data, [row["id"] for row in chosen]) if chosen else {}
    return [
        Mistake(
            id=row["id"],
            class_name=row["class_name"],
            taken_for=classes[row["predicted"]],
            guesses=list_guesses(row, classes),
            preview=previews[row["id"]],
        )
        for row in chosen
    ]


def _preview_all(data: str, ids: Sequence[str]) -> dict[str, Preview | PreviewError]:
    try:
        rows = _locate(data, ids)
    except (ValueError, OSError) as error:
        logger.warning("no previews: %s", error)
        return dict.fromkeys(ids, PreviewError(str(error)))
    return {name: _preview(rows[name]) if name in rows else PreviewError(f"{data} lacks it now") for name in ids}


def _locate(data: str, ids: Iterable[str]) -> dict[str, Row]:
    """Where the videos lie, by id, with their fps."""
    index = read_index(data)
    wanted = pa.array(list(ids), pa.string())
    facts = shards.read_table(storage.join(index.data, "videos.parquet"), ("id", "fps"))
    fps = {row["id"]: row["fps"] for row in facts.filter(pc.is_in(facts["id"], wanted)).to_pylist()}
    # Not its usable ones: other annotations may have labelled a video that has no label here.
    chosen = pc.and_(pc.equal(index.table["status"], "ok"), pc.is_in(index.table["id"], wanted))
    return {row["id"]: row | {"fps": fps[row["id"]]} for row in index.table.filter(chosen).to_pylist()}


def _preview(place: Row) -> Preview | PreviewError:
    try:
        row = shards.read_row(place["file"], place["row"], ["rgb", "flow"], version=place["version"])
    except (ValueError, LookupError, OSError) as error:
        return PreviewError(f"{place['file']} cannot be read: {error}")
    if row["id"] != place["id"]:
        return PreviewError(f"row {place['row']} of {place['file']} is {row['id']}: the shard was changed")
    return try_preview({**place, **row})
