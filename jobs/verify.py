"""Check a data set against its own records, and samples of it against their sources.

    python jobs/verify.py OUT                                hashes, counts, and 8 videos decoded
    python jobs/verify.py OUT --videos DIR --samples 32      also their sources: sha256, frames, flow computed anew

Prints a line for everything that is wrong; the exit status is 1 where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.command import run_command
from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.records import read_dataset
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import SettingsError
from pipelines.extraction import verify
from pipelines.extraction.verify import Finding, Recomputed
from pipelines.formatting import format_count


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Verify the output of jobs/extract_flow.py."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Shards, on disk or s3://."""
    videos: str | None = None
    """Folder of the source videos: those of the samples are decoded again, and their flow is computed again."""
    samples: int = 8
    """Number of videos to decode."""
    seed: int = 0
    """Seed that chooses the videos."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise SettingsError(f"--samples is {self.samples}: give 0 or more")
        for uri in (self.data, self.videos):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, verify, print."""
    run_command(Verify, lambda config: 1 if run(config) else 0, __doc__, stopped="nothing was written")


def run(config: Verify) -> list[Finding]:
    """All checks; prints what each of them found."""
    output = storage.absolute(config.data)
    index = read_index(output, agreeing=False)  # what differs is a finding
    dataset = read_dataset(output)
    samples = verify.choose_samples(index, config.samples, config.seed)
    # Generators, each of which does its work when its line is about to be printed.
    checks = {
        f"{format_count(len(dataset.shards), 'shard')} by their hashes": verify.check_shards(output, dataset),
        f"{format_count(len(index), 'video')} of the catalog": verify.check_catalog(output, dataset),
        f"{format_count(len(index), 'video')} in the tables": verify.check_tables(output, dataset),
        f"{format_count(len(samples), 'video')} decoded": (
            finding for video in samples for finding in verify.check_sample(video)
        ),
    }
    findings = []
    for title, check in checks.items():
        findings += report(title, list(check))
    if config.videos is not None:
        # The only check that needs the sources, which may be gone by now.
        findings += check_sources(config, index, samples)
    print(f"\n{'ok' if not findings else format_count(len(findings), 'finding')}: {output}")
    if findings:
        print(
            "repair      run the command that extracted it once more, with all the flags it had and --verify: it makes "
            "damaged and lost shards anew"
        )
    return findings


def report(title: str, findings: list[Finding]) -> list[Finding]:
    """Print one check."""
    print(f"{'ok' if not findings else 'WRONG':8}{title}", flush=True)
    for finding in findings:
        print(f"        {finding.where}: {finding.what}", flush=True)
    return findings


def check_sources(config: Verify, index: VideoIndex, samples: list[shards.Row]) -> list[Finding]:
    """The samples against their sources; prints the difference of each one's flow."""
    assert config.videos is not None
    columns = ("id", "source", "source_sha256", "start", "end")
    videos = shards.read_table(storage.join(index.data, "videos.parquet"), columns)
    facts = {row["id"]: row for row in videos.to_pylist()}
    dataset = read_dataset(index.data)
    comparisons = [verify.compare_source(video, facts[video["id"]], config.videos, dataset) for video in samples]
    recomputed = [entry for entry in comparisons if isinstance(entry, Recomputed)]
    findings = [entry for entry in comparisons if isinstance(entry, Finding)]
    findings += verify.judge(recomputed, dataset)
    report(f"{format_count(len(samples), 'source')}, and flow computed anew", findings)
    for entry in recomputed:
        print(f"        {entry.video}: {entry.mean:.3f} px mean, {entry.max:.2f} max")
    return findings


if __name__ == "__main__":
    main()
