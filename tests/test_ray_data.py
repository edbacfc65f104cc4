"""What Ray puts around an error is taken off again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from jobs.cluster import MEMORY_DEATHS
from pipelines.errors import OutageError, RunError
from pipelines.ray_data import MAX_WORKER_DEATHS, ON_CPU, plain_errors, polled_actor, quieten

ROOT = Path(__file__).resolve().parents[1]


def test_few_inputs_on_many_cpus_are_nothing_to_warn_of(ray_here: None) -> None:
    """What ran says so only as it ends, and here a warning is an error."""
    quieten()
    graph = ray.data.range(2, override_num_blocks=2).map(lambda row: row, concurrency=3)
    assert sorted(row["id"] for row in graph.iter_rows()) == [0, 1]


def test_a_users_error_is_found_in_what_ray_puts_around_it() -> None:
    account = RuntimeError("Task Map(extract) failed ten times")
    account.__cause__ = ray.exceptions.RayTaskError("extract", "Traceback …", RunError("the shard has changed"))
    with pytest.raises(RunError, match=r"^the shard has changed$"), plain_errors():
        raise account


@pytest.mark.parametrize("kind", [RunError, OutageError])
def test_a_users_error_of_a_task_arrives_as_it_was_raised(ray_here: None, kind: type[Exception]) -> None:
    """Whatever it was raised from: of that nothing but text would travel."""

    def fail(batch: pa.Table) -> pa.Table:
        try:
            raise ValueError("what was met")
        except ValueError as error:
            raise kind("s3://bucket is away") from error

    quieten()
    graph = ray.data.from_arrow([pa.table({"x": [1]})]).map_batches(fail, batch_format="pyarrow", **ON_CPU)
    with pytest.raises(kind, match=r"^s3://bucket is away$") as caught, plain_errors():
        graph.take_all()
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("death", "sentence"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMore"), "memory of"),
        (ray.exceptions.WorkerCrashedError(), "a worker process died 4 times"),
    ],
)
def test_a_death_that_nothing_more_is_tried_after_is_one_sentence(death: Exception, sentence: str) -> None:
    account = RuntimeError("Task MapBatches failed")
    account.__cause__ = death
    with pytest.raises(RunError, match=sentence) as caught, plain_errors():
        raise account
    assert "\n" not in str(caught.value)


HUNGRY = """
from jobs.cluster import connect
connect(num_cpus=1)
import ray, time
from pipelines.ray_data import ON_CPU, plain_errors, quieten
quieten()
def hold(row):
    time.sleep(60)
    return row
with plain_errors():
    ray.data.from_items([{"x": 1}]).map(hold, **ON_CPU).take_all()
"""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_what_the_memory_monitor_kills_is_tried_as_often_as_what_dies_otherwise() -> None:
    """To a monitor that a hundredth of the memory is too much for, every task is too large."""
    settings = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "250", "PYTHONPATH": str(ROOT)}
    settings |= {"RAY_task_oom_retry_delay_base_ms": "100"}
    command = [sys.executable, "-c", HUNGRY]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert "RunError: the memory of a node ran out, 4 times in the same task" in done.stderr
    assert int(MEMORY_DEATHS) == MAX_WORKER_DEATHS


@pytest.mark.parametrize("error", [ValueError("shapes"), RunError("as it was raised")])
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, plain_errors():
        raise error
    assert caught.value is error


def test_an_actor_that_is_gone_at_the_end_costs_nothing(ray_here: None) -> None:
    """What is told of a run matters less than the run."""

    class Box:
        def fetch(self) -> int:
            return 7

    heard: list[int] = []
    with polled_actor(Box, lambda box: heard.append(ray.get(box.fetch.remote())), every_s=60) as box:
        pass
    assert heard == [7]
    with polled_actor(Box, lambda box: heard.append(ray.get(box.fetch.remote())), every_s=60) as box:
        ray.kill(box)
    assert heard == [7]
