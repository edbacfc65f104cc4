"""deploy/slurm/ray.sbatch on two nodes of this machine: `srun` is a stand-in, Ray and the job are not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_head import end_nodes, wait_until

from pipelines import records
from pipelines.datasets.motion_videos import write_motion_videos
from pipelines.extraction.records import ExtractionRun

ROOT = Path(__file__).resolve().parents[1]
# What an allocation of two nodes does here: a command runs once for each node that is asked for, and a signal to srun
# reaches all of them.
SRUN = """#!/usr/bin/env bash
count=$SLURM_JOB_NUM_NODES
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && count=${1#*=}
    [[ $1 =~ ^--(overlap|nodes=.*|ntasks=.*|ntasks-per-node=1|nodelist=one|exclude=one)$ ]] || exit 2
    shift
done
tasks=()
trap 'kill "${tasks[@]}"' TERM
for ((task = 0; task < count; task++)); do "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
while kill -0 "${tasks[@]}" 2> /dev/null; do wait; done
exit $status
"""


@contextmanager
def started(folder: Path, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """What sbatch would start on the first of two nodes with two CPUs each."""
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    number = uuid.uuid4().int % 1_000_000
    slurm = {"JOB_ID": str(number), "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "2"}
    environment = {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURMD_NODENAME": "one",
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody waits for what still runs
    }
    command = ["bash", str(ROOT / "deploy" / "slurm" / "ray.sbatch"), *map(str, words)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, cwd=folder, text=True, start_new_session=True, **pipe)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        scratch = Path(f"/tmp/ray-{number}")
        end_nodes(scratch)
        left = scratch.exists()
        shutil.rmtree(scratch, ignore_errors=True)
    assert not left, "the script leaves nothing on its nodes"


def extraction(folder: Path, *, num_frames: int) -> tuple[str | Path, ...]:
    """A job with twelve shards to make."""
    write_motion_videos(folder / "videos", videos_per_class=2, seed=0, num_frames=num_frames, size=(64, 48))
    flags = ("--videos", folder / "videos", "--output", folder / "shards", "--short-side", "48")
    return ("jobs/extract_flow.py", *flags, "--videos-per-shard", "1")


@pytest.mark.soak
def test_a_job_runs_on_both_nodes(tmp_path: Path) -> None:
    with started(tmp_path, *extraction(tmp_path, num_frames=40)) as process:
        text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert "a cluster of 2 nodes, 4 CPUs" in text
    (run,) = (tmp_path / "shards" / "runs").iterdir()
    assert len(records.read(str(run), ExtractionRun).videos_by_node) == 2


@pytest.mark.soak
def test_before_its_time_is_up_a_job_stops_in_order(tmp_path: Path) -> None:
    with started(tmp_path, *extraction(tmp_path, num_frames=400)) as process:
        wait_until(lambda: len(list(tmp_path.glob("shards/commits/*"))) >= 2, process)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=240)
    assert process.returncode == 130, text
    assert "stopped; the same command goes on" in text
