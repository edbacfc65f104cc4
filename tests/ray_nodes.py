"""A Ray cluster of several nodes on this machine: python ray_nodes.py.

Prints the cluster's address, then reads a command a line and answers each by a line, until its input ends: `add CPUS
GPUS` by the new node's id, `lose ID` by the id of the node all of whose processes it killed, `lose head` likewise.
A script, because a process can hold one Ray only.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    # As in cluster.yaml, no work runs on the head.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        print({"add": add, "lose": lose}[command](cluster, *words), flush=True)
    for node in cluster.list_all_nodes():
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def add(cluster: Cluster, cpus: str, gpus: str) -> str:
    return str(cluster.add_node(num_cpus=int(cpus), num_gpus=int(gpus)).node_id)


def lose(cluster: Cluster, name: str) -> str:
    (node,) = (n for n in cluster.list_all_nodes() if name == n.node_id or (name == "head" and n is cluster.head_node))
    cluster.remove_node(node, allow_graceful=False)
    return str(node.node_id)


if __name__ == "__main__":
    main()
