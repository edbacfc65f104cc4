"""What a training says: metrics.jsonl, TensorBoard's event file, and lines for whoever watches."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

from pipelines import storage

Line = dict[str, Any]


def scalars_of(line: Line) -> dict[str, float]:
    """What can be drawn over the steps of a line of metrics, such as `train/loss`."""
    own = {"step", "time"}
    return {
        f"{line['kind']}/{name}": value
        for name, value in line.items()
        if isinstance(value, int | float) and name not in own
    }


class TrainingLog:
    """Collects lines and writes them out with each flush; only the first worker has one.

    A resumed run keeps the lines up to the clips it goes on from. The event file is a new one each time, as TensorBoard
    wants it.
    """

    def __init__(self, output: str, mailbox: Any, *, clips_seen: int, tensorboard: bool = True) -> None:
        self.uri = storage.join(output, "metrics.jsonl")
        self.events = storage.join(output, "tensorboard")
        self.mailbox = mailbox
        # Steps after the checkpoint are taken again, and log themselves again.
        earlier = storage.read_text(self.uri).splitlines() if clips_seen and storage.exists(self.uri) else []
        self.lines = [line for line in map(json.loads, earlier) if line["clips"] <= clips_seen]
        # TensorBoard's writer knows local files only, and appends, which S3 does not: each flush puts the whole file.
        self.folder = tempfile.mkdtemp(prefix="tensorboard-")
        self.left = False
        self.writer = SummaryWriter(self.folder, write_to_disk=tensorboard)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()
        # After an error nothing more is said: the run goes on from its last checkpoint, and its lines do.
        if error is None and not self.left:
            self.flush()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, kind: str, metrics: Line) -> None:
        """Take note of the metrics of some steps ("train") or of a validation ("validation")."""
        line = {"kind": kind, "time": round(time.time(), 1), **metrics}
        self.lines.append(line)
        for name, value in scalars_of(line).items():
            self.writer.add_scalar(name, value, metrics["step"])
        if self.mailbox:  # not waited for: training must not depend on whether somebody reads
            self.mailbox.put.remote(line)

    def leave(self) -> None:
        """Write nothing more: the files are another run's."""
        self.left = True

    def flush(self) -> None:
        """Write everything so far; each file by one atomic put."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        storage.put(self.uri, text.encode())
        self.writer.flush()
        for path in Path(self.folder).iterdir():
            storage.put(storage.join(self.events, path.name), path.read_bytes())
