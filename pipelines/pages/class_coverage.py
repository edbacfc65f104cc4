"""What became of each class's videos, and which classes a person should look at before training on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

STATUSES = ("ok", "missing", "quarantined")
LOST_SHARE = 0.1  # share of missing and quarantined videos from which on a class is marked
FEW_SHARE = 0.25  # of the median class: below this a class is marked as small
# Kinds of oddity in the order in which they are told, and their headings.
TROUBLES = {
    "empty": "nothing usable",
    "lost": "videos lost",
    "absent": "a split is empty",
    "still": "hardly any motion",
    "few": "few videos",
}


@dataclass(frozen=True, kw_only=True)
class Count:
    """Catalog videos of a class and split (or of a sum of these) by what became of them."""

    ok: int = 0
    missing: int = 0
    quarantined: int = 0

    @property
    def expected(self) -> int:
        return self.ok + self.missing + self.quarantined

    @property
    def lost(self) -> float:
        """Share of the expected videos that is not there; 0 where none is expected."""
        return 1 - self.ok / self.expected if self.expected else 0.0

    def __add__(self, other: Count) -> Count:
        return Count(**{name: getattr(self, name) + getattr(other, name) for name in STATUSES})


@dataclass(frozen=True, kw_only=True)
class ClassCoverage:
    """What became of one class: a count per split, its motion, and what is odd about it."""

    name: str
    splits: Mapping[str, Count]
    motion: Sequence[float] | None  # 5, 25, 50, 75 and 95% of its videos' mean |flow|, px
    notes: Mapping[str, str] = field(default_factory=dict)  # kind of oddity (a key of TROUBLES) → what is odd

    @property
    def total(self) -> Count:
        return sum(self.splits.values(), Count())


def cover_classes(videos: pa.Table, names: Iterable[str], still_px: float) -> list[ClassCoverage]:
    """One entry for each of the named classes and those of the videos, the most suspicious first.

    `videos`: videos.parquet's columns class_name, split, status and flow_mean; a class whose median video has a mean
    |flow| below `still_px` is marked.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in names}
    grouped = videos.group_by(["class_name", "split", "status"], use_threads=False)
    for row in grouped.aggregate([([], "count_all")]).to_pylist():
        split = counts.setdefault(row["class_name"] or "", {}).setdefault(row["split"], {})
        split[row["status"]] = row["count_all"]
    motion = _measure_motion(videos.filter(pc.equal(videos["status"], "ok")))
    entries = [
        ClassCoverage(
            name=name, splits={split: Count(**count) for split, count in by_split.items()}, motion=motion.get(name)
        )
        for name, by_split in counts.items()
    ]
    usual = _find_usual(entries)
    noted = [replace(entry, notes=dict(_find_oddities(entry, usual, still_px))) for entry in entries]
    return sorted(noted, key=_suspicion)


def _measure_motion(usable: pa.Table) -> dict[str, list[float]]:
    quantiles = pc.TDigestOptions(q=[0.05, 0.25, 0.5, 0.75, 0.95])
    grouped = usable.group_by("class_name", use_threads=False).aggregate([("flow_mean", "tdigest", quantiles)])
    return {row["class_name"] or "": row["flow_mean_tdigest"] for row in grouped.to_pylist()}


@dataclass(frozen=True, kw_only=True)
class _Usual:
    """What is usual among the classes that have videos."""

    ok: float  # usable videos of the median class
    splits: frozenset[str]  # in which more than half of the classes should have videos


def _find_usual(entries: Sequence[ClassCoverage]) -> _Usual:
    # A class list may name classes that this split or --limit has no video of.
    planned = [entry for entry in entries if entry.total.expected]
    splits = {split for entry in planned for split in entry.splits}
    return _Usual(
        ok=float(np.median([entry.total.ok for entry in planned])) if planned else 0.0,
        splits=frozenset(name for name in splits if 2 * sum(name in entry.splits for entry in planned) > len(planned)),
    )


def _find_oddities(entry: ClassCoverage, usual: _Usual, still_px: float) -> Iterator[tuple[str, str]]:
    total = entry.total
    if total.expected == 0:
        return
    if total.ok == 0:
        yield "empty", TROUBLES["empty"]
        return
    if total.lost >= LOST_SHARE:
        yield "lost", f"{total.lost:.0%} lost"
    if absent := [split for split in sorted(usual.splits) if entry.splits.get(split, Count()).ok == 0]:
        yield "absent", f"nothing in {' and '.join(absent)}"
    if total.ok < FEW_SHARE * usual.ok:
        yield "few", f"few videos (the median class has {usual.ok:g})"
    if entry.motion and entry.motion[2] < still_px:
        yield "still", TROUBLES["still"]


def group_troubles(entries: Iterable[ClassCoverage]) -> dict[str, list[tuple[ClassCoverage, str]]]:
    """Heading → the classes that it is true of, each with what is odd about it; the headings that some class has."""
    entries = list(entries)
    troubles = {
        heading: [(entry, entry.notes[kind]) for entry in entries if kind in entry.notes]
        for kind, heading in TROUBLES.items()
    }
    return {heading: odd for heading, odd in troubles.items() if odd}


def _suspicion(entry: ClassCoverage) -> tuple[object, ...]:
    total = entry.total
    return not total.expected, not entry.notes, -total.lost, -len(entry.notes), total.ok, entry.name
