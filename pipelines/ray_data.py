"""How this project runs Ray: Data that is quiet, patient and bounded in retries, and an actor that the driver polls."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import DataContext

from pipelines.errors import RunError, UserError

MAX_WORKER_DEATHS = 3  # a task whose worker died more often ends the run; Ray's own default is to retry for ever
RETRY_NOTE = "\nFailed to apply UDF transform after "
ON_CPU = {"num_cpus": 1, "max_retries": MAX_WORKER_DEATHS}  # of a step that computes on one processor


def quieten(context: DataContext | None = None) -> DataContext:
    """A context of Ray Data (None: this driver's) whose graphs say nothing themselves, and may take their time."""
    context = context or DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; the jobs print videos
    # Else workers raise Ray Data's own error, and of what they met, such as a store that is away, a traceback is left.
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # a shard may take hours, and a training that waits for its GPU too
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)  # start, finish and disabled progress bars, told as warnings
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what a task raised, which is raised here as well
    # max_retries has no named parameter yet, and the replacement by ray_remote_args_fn keeps steps from being fused.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    # Of few videos on many CPUs, where there is nothing that anybody could do.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")
    return context


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A UserError of a worker reaches the driver as it was raised, not inside Ray's account of the task that failed."""
    try:
        yield
    except Exception as error:
        if (plain := _find_user_error(error)) is None or plain is error:
            raise
        raise plain from None


def _find_user_error(error: BaseException | None) -> UserError | None:
    """What a worker raised, from the exceptions that Ray put around it; Ray's own copy of its class is none."""
    while error is not None:
        if isinstance(error, UserError) and not isinstance(error, ray.exceptions.RayError):
            # Ray Data adds how often it tried, and how to have it try more.
            error.args = tuple(p.partition(RETRY_NOTE)[0] if isinstance(p, str) else p for p in error.args)
            return error
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return RunError(
                f"the memory of a node ran out, {MAX_WORKER_DEATHS + 1} times in the same task: run the same command "
                f"again with fewer --num-cpus, or on nodes with more memory a CPU. Ray says: {_shorten(error)}"
            )
        if isinstance(error, ray.exceptions.WorkerCrashedError):
            return RunError(
                f"a worker process died {MAX_WORKER_DEATHS + 1} times in the same task, and its log, in Ray's folder, "
                f"says why: the same command tries again. Ray says: {_shorten(error)}"
            )
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _shorten(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


@contextlib.contextmanager
def polled_actor(kind: type, poll: Callable[[Any], None], *, every_s: float, **options: Any) -> Iterator[Any]:
    """An actor that workers tell something; `poll` is given it every few seconds, and once more at the end.

    Workers cannot call the driver, and it cannot call them: both call an actor. What Ray raises while polling is passed
    over: the actor may be restarted or slow, and the run matters more than what is told of it.
    """
    actor = ray.remote(num_cpus=0, max_restarts=-1, **options)(kind).remote()
    stop = threading.Event()

    def ask() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            poll(actor)

    def keep_asking() -> None:
        while not stop.wait(every_s):
            ask()

    thread = threading.Thread(target=keep_asking, daemon=True)
    thread.start()
    try:
        yield actor
        stop.set()
        thread.join(timeout=30)
        ask()  # what came after the thread last looked
    finally:
        stop.set()
        ray.kill(actor)
