"""Where a training can be watched besides its own files: MLflow or Weights & Biases, through their own libraries.

Both run in the driver, which has the user's environment; it says where their servers are. A tracker that fails costs
points of a curve and never the training. TensorBoard's files are written by the first worker (log.py).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

from pipelines.errors import SettingsError
from pipelines.training.log import Line, scalars_of

TrackerName = Literal["tensorboard", "mlflow", "wandb", "none"]
TRACKERS: tuple[str, ...] = get_args(TrackerName)
PROJECT = "two-stream-i3d"  # in which runs appear there
MOST_PARAMS = 100  # that MLflow takes at a time
MOST_CHARACTERS = 500  # of a parameter's value

AT_ONCE_S = 1.0  # within which a server that answers does so
PAUSE = 10  # times as long as a call was waited for that failed

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One run in a tracking server."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Take note of values at a step; a resumed run may come to a step again."""

    def close(self, *, finished: bool) -> None:
        """End the run there; `finished`: the training came to its end."""


class MLflowTracker:
    """A run of MLflow; the server is that of MLFLOW_TRACKING_URI. A resumed training goes on in the run that it had."""

    def __init__(self, output: str, settings: Mapping[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        name = identify(output)
        runs = list(self.client.search_runs([number], filter_string=f"tags.output_id = '{name}'"))
        if not runs:
            runs = [self.client.create_run(number, run_name=output, tags={"output": output, "output_id": name})]
            params = [Param(key, value) for key, value in settings.items()]
            for start in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(runs[0].info.run_id, params=params[start : start + MOST_PARAMS])
        self.run = runs[0].info.run_id
        self.client.update_run(self.run, status="RUNNING")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in scalars.items()])

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


class WandbTracker:
    """A run of Weights & Biases; WANDB_API_KEY, WANDB_MODE and so on are read by its library."""

    def __init__(self, output: str, settings: Mapping[str, str]) -> None:
        import wandb

        self.run = wandb.init(project=PROJECT, id=identify(output), name=output, config=dict(settings), resume="allow")
        # By our steps: its own only grow, and a resumed run takes some again.
        self.run.define_metric("*", step_metric="step")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log({**scalars, "step": step})

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


_OPENERS: dict[str, Callable[[str, Mapping[str, str]], Tracker]] = {"mlflow": MLflowTracker, "wandb": WandbTracker}


def identify(output: str) -> str:
    """A name without special characters that a run has for as long as it lies in this output."""
    return hashlib.sha256(output.encode()).hexdigest()[:16]


@contextmanager
def track(name: TrackerName, output: str, described: Mapping[str, Any]) -> Iterator[Callable[[Line], None]]:
    """A function that takes the lines of a training's metrics to a tracker; one that does nothing where there is none.

    `described` are the run's settings. Raises SettingsError where the library is not installed or cannot open a run.
    """
    if name not in _OPENERS:
        yield lambda line: None
        return
    try:
        tracker = _OPENERS[name](output, dict(_flatten(described)))
    except ImportError as error:
        raise SettingsError(f"--tracker {name} needs its package: pip install -e '.[{name}]' ({error})") from error
    except Exception as error:  # each library has exceptions of its own
        raise SettingsError(f"--tracker {name}: no run could be opened: {error}") from error
    finished, patience = False, _Patience()
    try:
        yield lambda line: patience.try_call(lambda: tracker.log(scalars_of(line), line["step"]))
        finished = True
    finally:
        _Patience().try_call(lambda: tracker.close(finished=finished))


class _Patience:
    """Calls a tracker, and leaves it alone for a while after it has kept its caller waiting for nothing.

    A library tries a server that is away for minutes, and a training has thousands of lines: waited for at each, they
    would hold up its end for days.
    """

    def __init__(self) -> None:
        self.until = 0.0

    def try_call(self, call: Callable[[], None]) -> None:
        started = time.monotonic()
        if started < self.until:
            return
        try:
            call()
        except Exception as error:  # a curve with a gap is better than a training that ends
            now = time.monotonic()
            if now - started > AT_ONCE_S:
                self.until = now + PAUSE * (now - started)
            logger.warning("the tracker took nothing this time: %s", error)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names with text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:MOST_CHARACTERS]
