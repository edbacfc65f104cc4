"""Where the first worker leaves its metrics for the driver; not in the trainer, so that the actor starts quickly."""

from __future__ import annotations

from typing import Any


class Mailbox:
    """Takes the metrics of the first worker, for the driver to fetch."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def put(self, line: dict[str, Any]) -> None:
        """Leave one line."""
        self.lines.append(line)

    def fetch(self) -> list[dict[str, Any]]:
        """The lines that came since the last time."""
        lines, self.lines = self.lines, []
        return lines
