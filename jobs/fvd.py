"""Fréchet Video Distance between two sets of videos: how far generated videos are from real ones, by I3D.

    python jobs/fvd.py REAL GENERATED --weights i3d_pretrained_400.pt --dialect videogpt --output OUT
    python jobs/fvd.py OUT/real.npz OTHER --weights i3d_pretrained_400.pt --dialect videogpt    statistics once computed

REAL and GENERATED are folders of videos, shards of jobs/extract_flow.py, or statistics of an earlier run. Numbers can
be compared only where the dialect, the weights and the number of clips are the same; docs/fvd.md says which weights
published numbers come from. OUT/fvd.json holds the result, OUT/real.npz and OUT/generated.npz the statistics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from jobs.cluster import check_counts, connect, count_processors, describe_workers
from jobs.command import locate_output, run_command
from pipelines import records, storage
from pipelines.errors import DataError, SettingsError
from pipelines.evaluation.frechet import (
    FeatureStatistics,
    check_comparable,
    frechet_distance,
    read_statistics,
    write_statistics,
)
from pipelines.evaluation.fvd_clips import ClipChoice, DialectName
from pipelines.evaluation.records import FVD, SetCounts, VideoDistance
from pipelines.formatting import format_count

SHOWN = 10  # videos that failed, on the screen; fvd.json has all


@dataclass(frozen=True, kw_only=True)
class FrechetVideoDistance:
    """Compute the Fréchet Video Distance between two sets of videos."""

    real: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REAL")]
    """Real videos: a folder, shards, or statistics (.npz), on disk or s3://."""
    generated: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GENERATED")]
    """Generated videos, in the same forms."""
    weights: str | None = None
    """I3D of the RGB stream, for all but statistics: i3d_pretrained_400.pt, i3d_torchscript.pt, released weights, a
    run."""
    dialect: DialectName = "stylegan-v"
    """stylegan-v: 400 logits, frames squeezed to 224×224. videogpt: 400 logits, shorter side 224, centre crop.
    features: 1024 features of the released RGB weights, shorter side 256, centre crop."""
    trust_torchscript: bool = False
    """Run a TorchScript file other than StyleGAN-V's own. It is a program, and does on this machine what it likes."""
    output: str | None = None
    """Folder for fvd.json and the statistics, on disk or s3://. None: the result is only printed."""
    split: str | None = None
    """Take only this split of shards. None: all."""
    clips: ClipChoice = field(default_factory=ClipChoice)
    max_videos: int | None = 2048
    """Videos of each set, drawn by --seed where there are more: StyleGAN-V's number. None: all."""
    min_clips: int = 256
    """Fewest clips of a set for which a distance is printed; the bias of fewer is larger than what is measured."""
    num_workers: int | None = None
    """Number of workers, each on a GPU if there are any. None: one per GPU, or one per CPU without GPUs."""
    num_cpus: int | None = None
    """CPUs of the Ray instance that the job starts on this machine. None: all."""
    num_gpus: int | None = None
    """GPUs to use. None: all; 0: compute on CPUs."""

    def __post_init__(self) -> None:
        check_counts(num_workers=self.num_workers, num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        if self.weights is None and not (is_statistics(self.real) and is_statistics(self.generated)):
            raise SettingsError("no network is given: name one by --weights; only two .npz of statistics need none")
        if self.max_videos is not None and self.max_videos < 1:
            raise SettingsError(f"--max-videos is {self.max_videos}: give at least 1, or None for all")
        if self.min_clips < 2:
            raise SettingsError(f"--min-clips is {self.min_clips}: a covariance needs at least 2")
        for uri in (self.real, self.generated, self.weights, self.output):
            if uri is not None:
                storage.absolute(uri)


def is_statistics(uri: str) -> bool:
    """Whether a URI names statistics of an earlier run."""
    return uri.endswith(".npz")


def main() -> None:
    """Parse, compute, print."""
    run_command(FrechetVideoDistance, run, __doc__, stopped="nothing was written")


def run(config: FrechetVideoDistance) -> VideoDistance:
    """Compute, write, print; returns what fvd.json holds."""
    output = None if config.output is None else locate_output(config.output)
    sides = {"real": config.real, "generated": config.generated}
    found: dict[str, tuple[FeatureStatistics, SetCounts]] = {
        name: read_side(uri) for name, uri in sides.items() if is_statistics(uri)
    }
    if len(found) < len(sides):
        found |= compute(config, {name: uri for name, uri in sides.items() if name not in found})
    (real, real_counts), (generated, generated_counts) = found["real"], found["generated"]
    for name, (_, counts) in found.items():
        check_count(name, counts, config.min_clips)
    check_comparable(real, generated, (config.real, config.generated))
    result = VideoDistance(
        fvd=frechet_distance(real, generated),
        dimensions=len(real.mean),
        embedding=real.embedding,
        settings={**asdict(config.clips), "max_videos": config.max_videos, "split": config.split},
        real=real_counts,
        generated=generated_counts,
    )
    if output is not None:
        for name, (statistics, _) in found.items():
            write_statistics(storage.join(output, f"{name}.npz"), statistics)
        records.write(storage.join(output, FVD), result)
    print(f"\n{format_result(result)}" + (f"\noutput      {output}" if output else ""))
    return result


def read_side(uri: str) -> tuple[FeatureStatistics, SetCounts]:
    """The statistics of an earlier run."""
    statistics = read_statistics(uri)
    return statistics, SetCounts(name=uri, videos=None, clips=statistics.count)


def compute(config: FrechetVideoDistance, sides: dict[str, str]) -> dict[str, tuple[FeatureStatistics, SetCounts]]:
    """The statistics of the sides that are videos."""
    print(f"ray         {connect(num_cpus=config.num_cpus)}", flush=True)
    # Not at the top: Ray reads its environment when it is imported, and `connect` sets it.
    from pipelines.evaluation import fvd

    cpus, gpus = count_processors(config.num_workers, config.num_gpus)
    num_workers = config.num_workers or gpus or int(cpus)
    assert config.weights is not None, "checked by the settings"
    embedding = fvd.Embedding(
        weights=storage.absolute(config.weights),
        dialect=config.dialect,
        choice=config.clips,
        trust_torchscript=config.trust_torchscript,
    )
    # The workers load it again; here it is loaded to be refused before any work.
    embedder = embedding.load()
    print(f"computing   {describe_workers('fp32', num_workers, use_gpu=gpus > 0)}", flush=True)
    found = {}
    for name, uri in sides.items():
        videos, lost = fvd.find_videos(storage.absolute(uri), config.split)
        places = videos.choose(config.max_videos, config.clips.seed)
        rows = []
        for row in fvd.embed_videos(videos, places, embedding, num_workers=num_workers, use_gpu=gpus > 0):
            rows.append(row)
            # About ten lines, however many videos: they also go to `ray job logs`.
            if len(rows) % max(1, len(places) // 10) == 0:
                print(f"{name:12}{len(rows):,} of {format_count(len(places), 'video')}", flush=True)
        statistics, counts = fvd.summarise_set(videos, lost, rows, embedder)
        for line in format_failures(counts):
            print(line, flush=True)
        check_count(name, counts, config.min_clips)
        assert statistics is not None, "two clips at least, as was just checked"
        found[name] = (statistics, counts)
    return found


def check_count(name: str, counts: SetCounts, least: int) -> None:
    """DataError where a set has too few clips for a distance to mean anything."""
    if counts.clips < least:
        raise DataError(
            f"{counts.name} gives {format_count(counts.clips, 'clip')}, and --min-clips is "
            f"{least:,}: of fewer the distance is "
            "mostly the bias of small samples. Give more videos or --clips-per-video, or lower it knowingly"
        )


def format_failures(counts: SetCounts) -> list[str]:
    """The videos that gave no clip, the first of them by name."""
    lines = [f"failed      {video}: {reason}" for video, reason in list(counts.failed.items())[:SHOWN]]
    more = len(counts.failed) - SHOWN
    return [*lines, *([f"failed      and {more:,} more"] if more > 0 else [])]


def format_result(result: VideoDistance) -> str:
    """The distance, and what it depends on."""
    embedding = result.embedding
    lines = [
        f"FVD         {result.fvd:.4f}",
        f"dialect     {embedding.get('dialect')}, {result.dimensions} numbers of each clip of "
        f"{embedding.get('frames')} frames, every {embedding.get('frame_step')}",
        f"weights     SHA-256 {str(embedding.get('weights_sha256'))[:16]}…",
    ]
    for name, counts in (("real", result.real), ("generated", result.generated)):
        videos = (
            "statistics"
            if counts.videos is None
            else f"{format_count(counts.videos, 'video')}, {len(counts.failed):,} failed"
        )
        lines.append(f"{name:12}{format_count(counts.clips, 'clip')}; {videos}")
    fewest = min(result.real.clips, result.generated.clips)
    if fewest <= result.dimensions:
        lines.append(
            f"few clips   {format_count(fewest, 'clip')} for {result.dimensions} dimensions: the "
            f"distance is biased upwards; "
            "compare it only with others of as many clips"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
