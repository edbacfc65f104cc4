"""cluster.yaml against Ray's own schema, and against what the jobs ask of a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_ray_accepts_it() -> None:
    from ray.autoscaler._private import util

    prepared = util.prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    util.validate_config(prepared)


def test_the_image_has_the_ray_that_is_installed(cluster: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["docker"]["image"] == f"rayproject/ray:{pinned[1]}-py311"


def test_workers_of_each_kind_can_come_and_go(cluster: dict[str, Any]) -> None:
    workers = {name: kind for name, kind in cluster["available_node_types"].items() if name != "head"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= cluster["max_workers"]
    assert workers["cpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in workers["gpu_worker"]["node_config"]


def test_what_jobs_ask_for_fits_a_node(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}  # no task lands beside the driver
    assert kinds["cpu_worker"]["resources"]["CPU"] >= 1  # decoding and flow: one CPU a task
    gpu = kinds["gpu_worker"]["resources"]
    assert gpu["GPU"] >= 1  # a flow actor, a training worker, a scorer
    assert gpu["CPU"] >= 2 * gpu["GPU"]  # beside each training worker at least one CPU decodes its clips


def test_no_key_is_in_it_and_data_stays_at_home(cluster: dict[str, Any]) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_access_key|aws_secret|SECRET", text, re.IGNORECASE)
    assert all("IamInstanceProfile" in kind["node_config"] for kind in cluster["available_node_types"].values())
    assert {"**/.git", "**/.venv", "**/out", "**/data"} <= set(cluster["rsync_exclude"])


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
