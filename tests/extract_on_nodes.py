"""Extracts on RAY_ADDRESS with flow on an actor that holds a GPU: python extract_on_nodes.py VIDEOS OUTPUT.

The GPU may be a pretended one: the actor computes on its CPU, so that the bytes are those of a run without GPUs.
"""

from __future__ import annotations

import sys

from jobs.cluster import connect
from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.shards import ShardSettings
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.extraction.work import find_work
from pipelines.lock import lock_output
from pipelines.media.decode import DecodeSettings

SETTINGS = ExtractionSettings(decode=DecodeSettings(short_side=64), shards=ShardSettings(videos_per_shard=2))
FLAGS = ("--short-side", "64", "--videos-per-shard", "2", "--flow-backend", "cpu")  # the same for the job


def make(videos: str, output: str) -> Plan:
    """The plan of an extraction with these settings."""
    from pipelines import tvl1

    kernel = tvl1.kernel_target("cpu")
    return make_plan(read_catalog(videos), SETTINGS, videos=videos, output=output, kernel=kernel)


def main(videos: str, output: str) -> None:
    connect()
    from pipelines.extraction import manifest
    from pipelines.extraction.graph import extract
    from pipelines.extraction.tasks import Placement

    plan = make(videos, output)
    with lock_output(output):
        for left in extract(plan, find_work(plan), backend="cpu", placement=Placement(flow_actors=1)):
            print(f"{left.shards} shards left", flush=True)
        manifest.finish(plan, manifest.assemble(plan))


if __name__ == "__main__":
    main(*sys.argv[1:])
