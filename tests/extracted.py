"""An extraction that nothing disturbs, made in this process without Ray, and what of an output is compared with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipelines import tvl1
from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.records import Dataset
from pipelines.datasets.shards import ShardSettings
from pipelines.extraction import manifest
from pipelines.extraction.plan import ExtractionSettings, Plan, make_plan
from pipelines.extraction.work import find_work
from pipelines.media.decode import DecodeSettings

SETTINGS = ExtractionSettings(decode=DecodeSettings(short_side=64), shards=ShardSettings(videos_per_shard=2))
FLAGS = ("--short-side", "64", "--videos-per-shard", "2", "--flow-backend", "cpu")  # the same for the job


def plan_here(
    videos: str, output: str, *, annotations: str | None = None, settings: ExtractionSettings = SETTINGS
) -> Plan:
    """The plan of an extraction."""
    catalog, kernel = read_catalog(videos, annotations), tvl1.kernel_target("cpu")
    return make_plan(catalog, settings, videos=videos, output=output, kernel=kernel)


def extract_here(plan: Plan) -> Dataset:
    """Make it shard by shard, by the graph's own steps."""
    from pipelines.extraction.graph import Steps  # imports ray, whose environment a script sets first

    steps = Steps.of(plan, backend="cpu")
    for block in find_work(plan):
        steps.make_shard(block)
    described = manifest.assemble(plan)
    manifest.finish(plan, described)
    return described


def hashes(output: Path) -> dict[str, str]:
    """sha256 of all that an output holds, but for the lock, the logs of runs and the page that shows those."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    lasting = [p for p in files if "runs" not in p.parts and p.name not in (".lock", "report.html")]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in lasting}
