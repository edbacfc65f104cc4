"""Which nodes make shards: those of one processor family, for float results differ between families.

A cluster may have nodes of several families, and others may join while a run is under way. What a node's kernel is
only the node itself can tell, so the nodes that are there are asked first, and a task that begins on one of another
family leaves its shard to others (`graph.run_graph`). Nodes that cost more than they are worth to flow on CPUs, as
those with GPUs do, are kept out by a label in cluster.yaml, which Ray's autoscaler heeds as well.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import tvl1
from pipelines.errors import RunError
from pipelines.ray_data import MAX_WORKER_DEATHS

CPU_FLOW = "two-stream-i3d/cpu-flow"  # label of a node: "no" keeps flow on CPUs away from it
NODE_ID = "ray.io/node-id"  # label that Ray gives every node

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The kernel that flow on CPUs is computed by, and the nodes that are there and have another one."""

    kernel: str
    others: Mapping[str, str]  # node id → kernel


def load_kernel(backend: str) -> str:
    """Load the flow kernel in this process, compiled for this machine; what it is compiled for."""
    tvl1.prewarm(backend)
    return tvl1.kernel_target(backend)


def find_fleet(backend: str, planned: str | None, load: Callable[[str], str] = load_kernel) -> Fleet:
    """Ask each node for its kernel by `load`, which compiles it there. Waits for a node where there is none.

    The fleet is of the `planned` kernel where a node has it, else of the one that most CPUs have.
    Raises RunError where no node can tell, time after time, and what loading the kernel raised.
    """
    for _ in range(MAX_WORKER_DEATHS + 1):
        nodes = list(_list_nodes())
        if not nodes:
            kernel = _receive(ray.remote(load).options(label_selector=select_nodes()).remote(backend))
            return Fleet(kernel=kernel, others={})
        if kernels := _ask(nodes, backend, load):
            return _choose(kernels, {node["NodeID"]: node["Resources"]["CPU"] for node in nodes}, planned)
    raise RunError("no node could load the flow kernel: Ray's logs say why. The same command tries again")


def _ask(nodes: Iterable[Mapping[str, Any]], backend: str, load: Callable[[str], str]) -> dict[str, str]:
    """Kernel of each node, by its id, but for those that were lost meanwhile."""
    # Without a CPU of theirs: others' tasks may hold all of them.
    asked = {
        node["NodeID"]: ray.remote(load)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(backend)
        for node in nodes
    }
    told = {node: _receive(answer, node) for node, answer in asked.items()}
    return {node: kernel for node, kernel in told.items() if kernel is not None}


def _choose(kernels: Mapping[str, str], cpus: Mapping[str, float], planned: str | None) -> Fleet:
    totals: Counter[str] = Counter()
    for node, kernel in kernels.items():
        totals[kernel] += int(cpus[node])
    if planned is not None and planned in totals:
        chosen = planned
    else:
        chosen = min(totals, key=lambda kernel: (-totals[kernel], kernel))
    return Fleet(kernel=chosen, others={node: kernel for node, kernel in kernels.items() if kernel != chosen})


def _list_nodes() -> Iterator[dict[str, Any]]:
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU") and node.get("Labels", {}).get(CPU_FLOW) != "no":
            yield node


def _receive(answer: Any, node: str | None = None) -> Any:
    """A node's kernel, or the error that loading it raised; None where the node was lost meanwhile."""
    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        # The worker's own error says what to mend; Ray's is about a task.
        raise (error.cause or error) from error
    except ray.exceptions.RayError as error:
        if node is None:
            raise
        logger.warning("node %s is passed over, it does not tell its kernel: %s", node, error)
        return None


def select_nodes(others: Collection[str] = ()) -> dict[str, str]:
    """Ray's label selector of the nodes that may make shards: all but those of another family, and labelled ones."""
    left_out = {NODE_ID: f"!in({', '.join(sorted(others))})"} if others else {}
    return {CPU_FLOW: "!no", **left_out}


def reserve_memory(wanted: int) -> int:
    """Bytes for a task to reserve: what it wants, or what the largest node has, on which it would else never run."""
    most = max((int(node["Resources"].get("memory", 0)) for node in _list_nodes()), default=0)
    return min(wanted, most) if most else wanted
