"""What came out of a training, and whether it has come out already; no Ray is needed to ask."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pipelines import records, storage
from pipelines.resume import was_begun
from pipelines.training.config import Metrics, Run
from pipelines.training.records import RESULT, RUN, RunResult


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a run; checkpoints are URIs."""

    last: str
    best: str
    metrics: Metrics


def find_result(run: Run, output: str) -> Result | None:
    """The result of this run where `output` holds it and it is finished; the caller holds the output's lock.

    Raises SettingsChangedError where `output` holds another finished run.
    """
    if not storage.exists(storage.join(output, RESULT)):
        return None
    described = keep_interval(run, output).describe()
    return read_result(output) if was_begun(storage.join(output, RUN), described) else None


def keep_interval(run: Run, output: str) -> Run:
    """The run with the checkpoint interval that `output` was begun with, where none is asked for now.

    Runs of earlier versions wrote down a default that followed from their number of workers.
    """
    uri = storage.join(output, "run.json")
    if run.reporting.checkpoint_every is not None or not storage.exists(uri):
        return run
    begun = json.loads(storage.read_bytes(uri))["reporting"]["checkpoint_every"]
    return replace(run, reporting=replace(run.reporting, checkpoint_every=begun))


def read_result(output: str) -> Result:
    """The result of a finished run."""
    result = records.read(storage.join(output, RESULT), RunResult)
    last, best = (storage.join(output, result.checkpoint(which)) for which in ("last", "best"))
    return Result(last=last, best=best, metrics=dict(result.metrics))
