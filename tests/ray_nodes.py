"""A Ray cluster of several nodes on this machine: python ray_nodes.py.

Prints the cluster's address, then reads a command a line and answers each by a line, until its input ends: `add CPUS
GPUS PROCESSOR LABELS`, the last two as JSON, by the new node's id, `lose ID` by the id of the node all of whose
processes it killed, `lose head` likewise.
A script, because a process can hold one Ray only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray._common.utils import get_ray_address_file
from ray.cluster_utils import Cluster

HEAD = {"num_cpus": 0, "include_dashboard": False}  # as in cluster.yaml, no work runs on the head
T = TypeVar("T")


def main() -> None:
    cluster = open_cluster()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        commands: dict[str, Callable[..., str]] = {"add": add, "lose": lose}
        print(commands[command](cluster, *words), flush=True)
    for node in cluster.list_all_nodes():
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def open_cluster() -> Cluster:
    """A head without CPUs, to which nodes may be added.

    Its address does not stay in Ray's folder, where the next ray.init() of anybody would look it up: a cluster that is
    killed would leave it there, and whoever found it would wait half a minute for nobody.
    """
    cluster = persist(lambda: Cluster(initialize_head=True, head_node_args=HEAD))
    Path(get_ray_address_file(None)).unlink(missing_ok=True)
    return cluster


def persist(start: Callable[[], T], *, attempts: int = 3) -> T:
    """What `start` returns. On a busy machine a node may miss Ray's deadline of 30 s, which no setting moves."""
    for left in reversed(range(attempts)):
        try:
            return start()
        except Exception:  # Ray raises no narrower one
            if left == 0:
                raise
    raise AssertionError("the last attempt returns or raises")


def add(cluster: Cluster, cpus: str, gpus: str, processor: str, labels: str) -> str:
    """A node; its kernels are compiled as for the named processor, where one is."""
    pretended = {"NUMBA_CPU_NAME": json.loads(processor)} if json.loads(processor) else {}
    more = {"env_vars": pretended, "labels": json.loads(labels)}
    return str(persist(lambda: cluster.add_node(num_cpus=int(cpus), num_gpus=int(gpus), **more)).node_id)


def lose(cluster: Cluster, name: str) -> str:
    (node,) = (n for n in cluster.list_all_nodes() if name == n.node_id or (name == "head" and n is cluster.head_node))
    cluster.remove_node(node, allow_graceful=False)
    return str(node.node_id)


if __name__ == "__main__":
    main()
