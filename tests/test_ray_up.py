"""docs/cluster-local.yaml, really brought up by `ray up`: two nodes of this machine, reached by ssh, in namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.datasets.motion_videos import write_motion_videos

ROOT = Path(__file__).resolve().parents[1]
FORWARD = """
ray dashboard docs/cluster-local.yaml --port 8266 &
until (exec 3<>/dev/tcp/127.0.0.1/8266) 2>/dev/null; do sleep 0.5; done
"$@"
"""
PROBE = """
import sys
import ray
from jobs import extract_flow
from pipelines.datasets.shards import ShardSettings
from pipelines.extraction.plan import ExtractionSettings

ray.init(log_to_driver=False)
settings = ExtractionSettings(shards=ShardSettings(videos_per_shard=1))
status = extract_flow.run(extract_flow.ExtractFlow(videos=sys.argv[1], output=sys.argv[2], settings=settings))
from ray.util.state import list_nodes, list_tasks

addresses = {node.node_id: node.node_ip for node in list_nodes()}
tasks = list_tasks(limit=1000, detail=True)
print("tasks on", sorted({addresses[task.node_id] for task in tasks if task.node_id}))
sys.exit(status)
"""


def find_missing() -> str:
    """What this machine lacks, in words; empty where it has everything."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root, for namespaces of its own"
    tools = {"sshd": "openssh-server", "rsync": "rsync", "ip": "iproute2", "unshare": "util-linux"}
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [package for tool, package in tools.items() if not shutil.which(tool, path=path)]
    if lacking:
        return f"needs the packages {' '.join(lacking)}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "this machine allows no namespaces"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_up_makes_a_cluster_whose_two_nodes_extract(tmp_path: Path) -> None:
    if missing := find_missing():
        pytest.skip(missing)
    write_motion_videos(tmp_path / "videos", videos_per_class=2, seed=0, num_frames=60, size=(128, 96))
    output = tmp_path / "shards"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"}
    command = ["docs/cluster-local.sh", str(tmp_path / "cluster"), "bash", "-euc", FORWARD, "--"]
    command += ["ray", "job", "submit", "--address", "http://127.0.0.1:8266", "--working-dir", ".", "--"]
    command += ["python", "-c", PROBE, str(tmp_path / "videos"), str(output)]
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipe)  # type: ignore[call-overload]
    try:
        text, _ = process.communicate(timeout=600)
    finally:
        process.kill()  # and with it, by the kernel, everything in its namespaces
    assert process.returncode == 0, text
    assert "a cluster of 2 nodes" in text
    assert "tasks on ['127.0.0.2', '127.0.0.3']" in text
    assert (output / "dataset.json").exists()
