"""Extraction on a cluster of several nodes, of which some are lost and some come while it runs.

Whatever happens, the bytes are those of a run in one process that no Ray had a part in.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from extracted import FLAGS, extract_here, hashes, plan_here

from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.extraction.fleet import CPU_FLOW

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
WAIT_S = 200.0
SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too this is what keeps sockets on 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Nodes:
    """A cluster in a process of its own; on entering a head without CPUs."""

    def __init__(self, log: Path) -> None:
        self.environment = {**os.environ, **SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.log = log
        self.drivers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Nodes:
        command = [sys.executable, str(TESTS / "ray_nodes.py")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.environment["RAY_ADDRESS"] = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            driver.kill()
        self.process.communicate(timeout=WAIT_S)

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.log.read_text()[-3000:]
        return line

    def _ask(self, command: str) -> str:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._read()

    def add(self, *, cpus: int = 0, gpus: int = 0, processor: str = "", label: str = "") -> str:
        """Start a node; its id."""
        labels = {CPU_FLOW: label} if label else {}
        return self._ask(f"add {cpus} {gpus} {json.dumps(processor)} {json.dumps(labels, separators=(',', ':'))}")

    def lose(self, node: str) -> str:
        """Kill all processes of a node (an id, or `head`); its id."""
        return self._ask(f"lose {node}")

    def start(self, script: Path, *arguments: str | Path) -> subprocess.Popen[str]:
        """A driver on this cluster."""
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.drivers.append(subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes))
        return self.drivers[-1]

    def start_job(self, videos: Path, output: Path) -> subprocess.Popen[str]:
        return self.start(ROOT / "jobs" / "extract_flow.py", "--videos", videos, "--output", output, *FLAGS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good videos and 4 broken ones: 8 shards."""
    folder = tmp_path_factory.mktemp("videos")
    write_motion_videos(folder, videos_per_class=2, seed=3, num_frames=120, size=(64, 48))
    write_broken_videos(folder / "train" / "broken")
    return folder


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of a data set that this process made step by step."""
    output = tmp_path_factory.mktemp("undisturbed")
    splits = extract_here(plan_here(str(videos), str(output))).splits.values()
    counts = [(split.expected, split.ok, split.quarantined) for split in splits]
    assert list(map(sum, zip(*counts, strict=True))) == [16, 12, 4]
    return hashes(output)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(tmp_path_factory.mktemp("nodes") / "log") as nodes:
        yield nodes


def commits(output: Path) -> dict[str, int]:
    """The commit records there are, each with the time it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "commits").glob("*.json")}


def count_changed(before: dict[str, int], output: Path) -> int:
    """How many of these records were written anew: a node is lost with the task whose end it has not reported yet."""
    return len(before.items() - commits(output).items())


def wait_for(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until something is true, while the process runs."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said[-5000:]
    return said


@pytest.mark.soak
def test_a_node_that_joins_is_used_and_one_that_is_lost_changes_nothing(
    nodes: Nodes, videos: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output, first = tmp_path / "out", nodes.add(cpus=1)
    job = nodes.start_job(videos, output)
    wait_for(lambda: commits(output), job)
    joined = nodes.add(cpus=1)
    wait_for(lambda: len(commits(output)) >= 3, job)
    before = commits(output)
    nodes.lose(first)
    finish(job)
    assert len(before) < len(commits(output)) == 8
    assert count_changed(before, output) <= 1
    assert hashes(output) == undisturbed
    (record,) = (output / "runs").iterdir()
    assert json.loads(record.read_bytes())["videos_by_node"].keys() == {first, joined}
    nodes.lose(joined)


@pytest.mark.soak
def test_nodes_of_another_processor_family_make_no_shards_and_end_no_run(
    nodes: Nodes, videos: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """One is there at the start, one joins while the run is under way, and one is kept out by its label."""
    planned, labelled = nodes.add(cpus=2), nodes.add(cpus=1, label="no")
    others = [nodes.add(cpus=1, processor="haswell")]
    job = nodes.start_job(videos, tmp_path / "out")
    wait_for(lambda: commits(tmp_path / "out"), job)
    others.append(nodes.add(cpus=1, processor="haswell"))
    said = finish(job)
    assert f"left out    node {others[0]}, whose flow would differ: cpu" in said
    assert f"node {others[1]} makes no shards: it is of another processor family" in said
    assert hashes(tmp_path / "out") == undisturbed
    (record,) = (tmp_path / "out" / "runs").iterdir()
    assert json.loads(record.read_bytes())["videos_by_node"].keys() == {planned}
    nodes.lose(planned)
    next((tmp_path / "out" / "commits").glob("*.json")).unlink()  # so that there is something left to do
    resumed = nodes.start_job(videos, tmp_path / "out")
    said, _ = resumed.communicate(timeout=WAIT_S)
    assert resumed.returncode == 1
    assert "settings.kernel" in said
    for node in (labelled, *others):
        nodes.lose(node)


def test_a_killed_driver_goes_on_and_the_only_node_with_cpus_and_the_only_gpu_are_lost_and_replaced(
    nodes: Nodes, videos: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output, decoding, gpu = tmp_path / "out", nodes.add(cpus=1), nodes.add(gpus=1)
    driver = nodes.start(TESTS / "extract_on_nodes.py", videos, output)
    wait_for(lambda: commits(output), driver)
    driver.kill()
    driver.communicate(timeout=WAIT_S)
    killed = commits(output)
    assert not (output / "dataset.json").exists()
    driver = nodes.start(TESTS / "extract_on_nodes.py", videos, output)
    wait_for(lambda: len(commits(output)) > len(killed), driver)
    joined = nodes.add(cpus=1)
    lost = commits(output)
    nodes.lose(gpu)
    replacement = nodes.add(gpus=1)
    nodes.lose(decoding)
    finish(driver)
    assert len(lost) < len(commits(output)) == 8
    assert killed.items() <= lost.items()
    assert count_changed(lost, output) <= 1
    assert hashes(output) == undisturbed
    for node in (joined, replacement):
        nodes.lose(node)


@pytest.mark.soak
def test_after_the_head_is_lost_with_the_driver_a_new_cluster_goes_on(
    videos: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with Nodes(tmp_path / "first.log") as nodes:
        nodes.add(cpus=2)
        job = nodes.start_job(videos, output)
        wait_for(lambda: len(commits(output)) >= 2, job)
        nodes.lose("head")
        job.kill()  # it ran on the head
        job.communicate(timeout=WAIT_S)
    kept = commits(output)
    assert not (output / "dataset.json").exists()
    with Nodes(tmp_path / "second.log") as nodes:
        nodes.add(cpus=2)
        finish(nodes.start_job(videos, output))
    assert kept.items() <= commits(output).items()
    assert hashes(output) == undisturbed


@pytest.mark.soak
def test_under_fire_every_row_is_accounted_for_once_and_all_bytes_are_equal(tmp_path: Path) -> None:
    flags = ["--minutes", "0.3", "--seed", "1", "--videos-per-class", "2", "--frames", "120", "--pause-s", "2", "5"]
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"all hashes equal, weights too +1 of 1 rounds", done.stdout)
