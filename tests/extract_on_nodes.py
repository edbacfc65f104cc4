"""Extracts on RAY_ADDRESS with flow on an actor that holds a GPU: python extract_on_nodes.py VIDEOS OUTPUT.

The GPU may be a pretended one: the actor computes on its CPU, so that the bytes are those of a run without GPUs.
"""

from __future__ import annotations

import sys

from extracted import plan_here

from jobs.cluster import connect
from pipelines.extraction.work import find_work
from pipelines.lock import lock_output


def main(videos: str, output: str) -> None:
    connect()
    from pipelines.extraction import manifest
    from pipelines.extraction.graph import extract
    from pipelines.extraction.tasks import Placement

    plan = plan_here(videos, output)
    with lock_output(output):
        for left in extract(plan, find_work(plan), backend="cpu", placement=Placement(flow_actors=1)):
            print(f"{left.shards} shards left", flush=True)
        manifest.finish(plan, manifest.assemble(plan))


if __name__ == "__main__":
    main(*sys.argv[1:])
