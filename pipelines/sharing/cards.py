"""README.md of what is shared, as Hugging Face's hub reads it: metadata first, then what a stranger has to know.

The metadata is YAML of one line a key, each value as JSON, which is YAML too and escapes whatever a name holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.errors import SettingsError

PROJECT = "two-stream-i3d"
PAPER = "1705.07750"  # on arXiv
LICENCE = "unknown"  # the hub's own word for it
# What the hub counts data sets by: fewer than so many rows.
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the files do not say: the card's title, what the videos are called, the licence, and where it goes."""

    name: str
    dataset: str | None = None
    licence: str = LICENCE
    repo: str | None = None  # on the hub


def front_matter(metadata: Mapping[str, object]) -> str:
    """The block between the two rules at the top of a card; keys without a value are left out."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items() if value]
    return "\n".join(["---", *lines, "---"])


def join_sections(parts: Sequence[str]) -> str:
    """A card of its parts, those that are empty left out."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def table(rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = [[_escape(str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _escape(text: str) -> str:
    """Text that stays in its cell and is shown as it is."""
    for character in ("\\", "|", "<", "`"):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def code(lines: str) -> str:
    """A block of Python."""
    return f"```python\n{lines.strip()}\n```"


def folder_code(repo: str | None, repo_type: str) -> str:
    """The lines of a card that find its own folder: fetched from the hub, or where the reader has put it."""
    if repo is None:
        # With its name: `datasets` calls a data set by that, and "." has none.
        return "from pathlib import Path\n\nfolder = str(Path.cwd())  # the folder that this file lies in"
    kind = "" if repo_type == "model" else f", repo_type={repo_type!r}"
    return f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({repo!r}{kind})"


def licence_section(licence: str) -> str:
    """What may be done with the files, as far as it was said."""
    if licence == LICENCE:
        return "## Licence\n\nNot stated. Without one, ask whoever published this before you use it."
    return f"## Licence\n\n{licence}, as stated by whoever published this."


def check_licence(licence: str) -> None:
    """SettingsError for what cannot be a licence's identifier on the hub, such as `Apache 2.0`."""
    if not licence or licence != licence.lower() or " " in licence:
        raise SettingsError(
            f"--license is {licence!r}: give an identifier of the hub, such as apache-2.0, cc-by-4.0 or other"
        )


def size_category(rows: int) -> str:
    """`1K<n<10K`: the hub's class of a data set by its rows."""
    return next((name for limit, name in SIZES if rows < limit), "n>1M")
