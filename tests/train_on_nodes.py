"""Trains on two nodes, loses one in the middle: python train_on_nodes.py DATA OUTPUT spare|elastic SCHEDULE.

With a spare node the lost one is replaced; else the training goes on with the worker that is left. SCHEDULE is of the
form STEPS,LOG_EVERY,CHECKPOINT_EVERY. A script, because a process can hold one Ray only.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

import ray
from ray_nodes import open_cluster

from pipelines.datasets.video_index import read_index
from pipelines.training.config import Scale
from pipelines.training.settings import PRESETS, prepare
from pipelines.training.trainer import train


def main(data: str, output: str, way: str, schedule: str) -> None:
    """Train; when the first checkpoint is known, kill a node on which a worker runs."""
    cluster = open_cluster()
    for _ in range(3 if way == "spare" else 2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    # More than half of a node's CPUs: one worker on each of two.
    min_workers = None if way == "spare" else 1
    data_cpus = 1.0 if way == "spare" else None  # what is left of one node is less
    scale = Scale(num_workers=2, min_workers=min_workers, cpus_per_worker=1.5, data_cpus=data_cpus)
    steps, log_every, checkpoint_every = map(int, schedule.split(","))
    settings = PRESETS["debug"].change(
        network={"stream": "flow"},
        schedule={"steps": steps},
        reporting={"log_every": log_every, "checkpoint_every": checkpoint_every},
    )
    run, model = prepare(settings, read_index(data), scale)

    def lose_a_node() -> None:
        snapshot = Path(output) / "checkpoints" / "checkpoint_manager_snapshot.json"
        while not (snapshot.exists() and "clips-" in snapshot.read_text()):
            time.sleep(0.1)
        groups = ray.util.placement_group_table().values()
        used = {node for group in groups for node in group["bundles_to_node_id"].values()}
        cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id in used), allow_graceful=False)
        print("lost a node", flush=True)

    thread = threading.Thread(target=lose_a_node, daemon=True)
    thread.start()
    train(run, model, output, scale)
    thread.join(timeout=60)
    ray.shutdown()
    cluster.shutdown()
    print("trained", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
