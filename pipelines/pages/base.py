"""What all pages share: the templates and their filters, and how a page is put in its folder.

A page is a single file without a link to the network. Whatever comes from the data (ids, class names, error messages)
is hostile until escaped, which the templates do for everything but our own plots. Equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2
import markupsafe

from pipelines import storage
from pipelines.formatting import format_bytes, format_count, format_seconds
from pipelines.pages.class_coverage import STATUSES, Count

TEMPLATES = Path(__file__).parent / "templates"
NUM_OPEN_CLASSES = 20  # the others unfold


def put_page(output: str, page: str) -> str:
    """Write a page as report.html of a folder; returns its URI. What is no Unicode in a name becomes a ?."""
    uri = storage.join(output, "report.html")
    storage.put(uri, page.encode(errors="replace"))
    return uri


def make_environment() -> jinja2.Environment:
    """Templates with the filters that all pages share; whatever they are given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        # A misspelt name is an error, and no empty cell that nobody sees.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "thousands": lambda number: f"{number:,}",
        "count": format_count,
        "size": format_bytes,
        "time": format_seconds,
        "base64": lambda data: base64.b64encode(data).decode(),
        "plain": _plain,
        "flat": _flatten,
        "hours": lambda hours: format_seconds(3600 * hours),
    }
    script = (TEMPLATES / "previews.js").read_text()
    environment.globals |= {
        "count_of": lambda counts: Count(**{name: getattr(counts, name) for name in STATUSES}),
        "script": markupsafe.Markup(script),
        # The page's Content-Security-Policy lets this script run by its hash, and no other.
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment


def _plain(text: object, most: int = 400) -> str:
    """Text of unknown origin on one line, without control characters, cut to `most` characters."""
    # Some that cannot be printed reverse the text around them (U+202E).
    line = "".join(char if char.isprintable() else " " for char in str(text))
    return line if len(line) <= most else line[: most - 1] + "…"


def _flatten(value: object, name: str = "") -> dict[str, object]:
    """Nested settings as one level of dotted names; what lists hold has its number in the name, from 1."""
    if isinstance(value, (list, tuple)):
        if not any(isinstance(part, (list, tuple, Mapping)) for part in value):
            return {name: ", ".join(map(str, map(_round, value))) or "none"}
        value = dict(enumerate(value, 1))
    if not isinstance(value, Mapping):
        return {name: "not set" if value is None else _round(value)}
    parts = [_flatten(part, f"{name}.{key}" if name else str(key)) for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def _round(value: object) -> object:
    """A number without the last digits of its arithmetic."""
    return float(f"{value:.8g}") if isinstance(value, float) else value
