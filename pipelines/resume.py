"""An output goes on with the settings it was begun with, or not at all: mixed in one output they would look alike."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pipelines import records, storage
from pipelines.errors import SettingsChangedError


def was_begun(uri: str, settings: Mapping[str, object]) -> bool:
    """Whether these settings lie at `uri`, where an output's first file is; False where nothing does.

    Raises SettingsChangedError, which names every setting that differs, where others lie there. The caller holds the
    output's lock, and writes the file where there was none.
    """
    try:
        stored = records.parse(storage.read_bytes(uri), uri)
    except FileNotFoundError:
        return False
    before, now = (_flatten(record) for record in (stored, json.loads(json.dumps(settings))))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        # What is derived from a setting that changed would only hide it.
        named = [name for name in changed if not name.startswith("derived.")] or changed
        sides = ((name, before.get(name, "nothing"), now.get(name, "nothing")) for name in named)
        lines = "\n".join(f"  {name}: {there} there, {here} now" for name, there, here in sides)
        raise SettingsChangedError(
            f"{uri.rpartition('/')[0]} was begun with other settings:\n{lines}\n"
            "Run with the settings it was begun with, or choose another --output"
        )
    return True


def _flatten(value: object, name: str = "") -> dict[str, str]:
    """Every leaf of nested dicts as text under its dotted name; a leaf that is None differs from one that is absent."""
    if not isinstance(value, dict):
        return {name: repr(value)}
    parts = [_flatten(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return {key: text for part in parts for key, text in part.items()}
