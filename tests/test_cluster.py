"""A Ray of our own beside others: which one its workers ask."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jobs.cluster import check_precision, count_processors, describe_workers
from pipelines.errors import SettingsError

ROOT = Path(__file__).resolve().parents[1]
ASK = """
import sys
from jobs.cluster import connect

connect(num_cpus=1, log_to_driver=False, dashboard=sys.argv[1] == "dashboard")
import ray
from ray._private.worker import _global_node
from ray.train.v2._internal.state.util import is_actor_alive

print(*sorted(_global_node.all_processes))


@ray.remote(num_cpus=0)
class Actor:
    def id(self):
        return ray.get_runtime_context().get_actor_id()


actor = Actor.remote()
name = ray.get(actor.id.remote())
try:
    print("alive", ray.get(ray.remote(num_cpus=0)(is_actor_alive).remote(name, 60)))
except ray.exceptions.RayTaskError as error:
    print("refused" if "Connection refused" in str(error) else error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "processes", "answer"),
    [
        pytest.param("dashboard", "dashboard gcs_server raylet", "alive True", marks=pytest.mark.soak),
        ("none", "gcs_server raylet", "refused"),
    ],
)
def test_workers_ask_their_own_ray_whatever_else_was_started_on_this_machine(
    words: str, processes: str, answer: str
) -> None:
    """Where it has nobody to ask they know it at once, and do not wait for an answer."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path may have 107 characters
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            elsewhere = f"127.0.0.1:{silent.getsockname()[1]}"
            (folder / "ray").mkdir()
            (folder / "ray" / "ray_current_cluster").write_text(elsewhere)  # of a Ray that was killed
            environment = {**os.environ, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
            environment["RAY_API_SERVER_ADDRESS"] = f"http://{elsewhere}"  # of a cluster that hangs
            command = [sys.executable, "-c", ASK, words]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2:] == [processes, answer]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


LATE = """
import os
from pathlib import Path

from jobs.cluster import connect

def children():
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state not in "ZX":
            found.add(stat.parent.name)
    return found

import ray._private.services as services
get_node, first = services.get_node, []

def late(*words):
    if not first:
        first.append(children())
        raise Exception("The current node timed out during startup.")
    return get_node(*words)

before = children()
services.get_node = late
print(connect(num_cpus=1, log_to_driver=False))
import ray
assert len(first[0] - before) >= 2, first
assert ray.get(ray.remote(lambda: 7).remote()) == 7
print("left", len(first[0] & children() - before))
"""


@pytest.mark.slow
def test_a_ray_that_came_up_too_late_leaves_no_process_behind() -> None:
    """Another one is started, and works."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        environment = {**os.environ, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # before it imports ray
        command = [sys.executable, "-c", LATE]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "left 0"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_workers_are_told_of_with_their_precision() -> None:
    assert describe_workers("bf16", 2, use_gpu=True) == "2 GPUs, bf16, sums and logits in fp32"
    assert describe_workers("fp32", 1, use_gpu=True) == "1 GPU, fp32, no TensorFloat-32"
    assert describe_workers("fp32", 4, use_gpu=False) == "4 CPUs, fp32"
    check_precision("fp16", gpus=1)
    with pytest.raises(ValueError, match="fp16 needs GPUs"):
        check_precision("fp16", gpus=0)


def test_more_gpus_than_this_machine_has_are_refused_and_awaited_on_a_cluster(
    ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_processors(2, None) == (3, 2)
    assert count_processors(None, 1) == (3, 1)
    assert count_processors(8, 0) == (3, 0)  # on CPUs, of which workers take shares
    for num_workers, num_gpus, wanted in ((3, None, 3), (None, 4, 4), (3, 1, 3)):
        with pytest.raises(SettingsError, match=f"this machine has 2 GPUs, and the flags ask for {wanted}"):
            count_processors(num_workers, num_gpus)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert count_processors(3, None) == (3, 2)
    assert count_processors(None, 4) == (3, 4)
