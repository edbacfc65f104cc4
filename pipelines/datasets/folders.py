"""Folders of videos without annotation files → annotations: the folders above a video tell its class and split.

Most data sets lie as CLASS/video or SPLIT/CLASS/video. Which of the two, is taken from the folders' names only where
they leave no doubt; else both readings are shown, for wrong labels cost a training and nothing else would tell.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pipelines.datasets.annotations import (
    SPLIT_SYNONYMS,
    WHOLE,
    Annotation,
    Annotations,
    CatalogError,
    check_splits,
    make_path_ids,
    order_classes,
    read_labels,
    read_split,
    refuse,
)
from pipelines.formatting import format_count

Layout = Literal["auto", "class", "split-class", "flat"]
SOURCES = {"class": "a folder per class", "split-class": "split folders above class folders", "flat": "a flat folder"}

logger = logging.getLogger(__name__)


def annotate_folders(paths: Sequence[str], layout: Layout = "auto") -> Annotations:
    """Rows of the videos of a folder, from their relative paths.

    class        CLASS/x.mp4, deeper folders allowed
    split-class  SPLIT/CLASS/x.mp4, deeper folders allowed; `videos_train` and `videos_val` are train and val
    flat         no labels, whatever the folders
    auto         split-class where all folders of the first level are named as splits, class where none is, flat where
                 there are no folders; CatalogError, with both readings, where that may be wrong

    A video outside any class folder is unlabelled.
    """
    folders = [path.split("/")[:-1] for path in paths]
    if layout == "auto":
        layout = _guess_layout(paths, folders)
    splits = [WHOLE] * len(paths)
    if layout == "split-class":
        refuse("video", "outside the split folders", _find_outside(paths), "Move them into one of the split folders")
        splits = _name_splits([folder[0] for folder in folders])
        check_splits(splits, [""] * len(splits))
    labels = read_labels(_name_classes(folders, layout))
    classes = order_classes(labels)
    if classes and "" in labels:
        logger.warning("outside the class folders and unlabelled: %s", format_count(labels.count(""), "video"))
    rows = zip(make_path_ids(paths), labels, splits, paths, strict=True)
    source = SOURCES[layout] if classes or layout == "split-class" else SOURCES["flat"]
    return Annotations([Annotation(*row, place=row[-1]) for row in rows], classes, source)


def _guess_layout(paths: Sequence[str], folders: Sequence[list[str]]) -> Layout:
    tops = {folder[0] for folder in folders if folder}
    known = {top for top in tops if top.lower() in SPLIT_SYNONYMS}
    named_alike = _strip_affix(tops) is not None
    deep = bool(paths) and all(len(folder) > 1 for folder in folders)  # one level deeper than class folders would be
    if not tops:
        return "flat"
    # all(folders): a video beside the split folders would be in none of them.
    if (known == tops and all(folders)) or (named_alike and deep):
        return "split-class"
    if known or named_alike or deep:
        _refuse_two_readings(paths, folders)
    return "class"


def _refuse_two_readings(paths: Sequence[str], folders: Sequence[list[str]]) -> None:
    by_class = _count("class", _name_classes(folders, "class"))
    outside = _find_outside(paths)
    if outside:
        by_split = f"leave {format_count(len(outside), 'video')} outside the split folders: {outside[0]}"
    else:
        splits = _count("split", _name_splits([folder[0] for folder in folders]))
        below = _count("class", _name_classes(folders, "split-class"))
        by_split = f"are {splits} {f'of {below}' if below else 'without classes'}"
    tops = {folder[0] for folder in folders if folder}
    inner = f", or give {min(tops)} as the videos folder" if len(tops) == 1 else ""
    raise CatalogError(
        f"the folders of the videos may mean two things: as a folder per class they are {by_class}; as splits above "
        f"class folders they {by_split}. Choose --layout class or --layout split-class{inner}"
    )


def _count(what: str, names: Sequence[str]) -> str:
    """`2 classes (kick: 3, wave: 4)`, the first three by name; empty where there is no name."""
    counts = sorted(Counter(name for name in names if name).items())
    if not counts:
        return ""
    number = f"{len(counts)} {what}{('es' if what == 'class' else 's') * (len(counts) > 1)}"
    return f"{number} ({', '.join(f'{name}: {count}' for name, count in counts[:3])}{', …' * (len(counts) > 3)})"


def _name_classes(folders: Sequence[list[str]], layout: Layout) -> list[str]:
    level = {"class": 0, "split-class": 1}.get(layout)
    return ["" if level is None or len(folder) <= level else folder[level] for folder in folders]


def _name_splits(tops: Sequence[str]) -> list[str]:
    """Splits of first-level folders: what tells them apart where all are named alike, else their names."""
    names = _strip_affix(set(tops)) or {top: read_split(top) for top in tops}
    return [names[top] for top in tops]


def _strip_affix(tops: set[str]) -> dict[str, str] | None:
    """The split in each of `videos_train`, `videos_val`; None where the names differ in more, or all are one split."""
    # With what stands between the words: `a_train` and `a-val` are not named alike.
    parts = {top: re.split(r"([\W_]+)", top.lower()) for top in tops}
    splits = {top: [part for part in names if part in SPLIT_SYNONYMS] for top, names in parts.items()}
    rests = {tuple(part for part in names if part not in SPLIT_SYNONYMS) for names in parts.values()}
    if len(rests) != 1 or any(len(names) != 1 for names in splits.values()):
        return None
    named = {top: SPLIT_SYNONYMS[names[0]] for top, names in splits.items()}
    # One split alone tells nothing apart: it may as well be a class.
    return named if len(set(named.values())) > 1 else None


def _find_outside(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not posixpath.dirname(path)]
