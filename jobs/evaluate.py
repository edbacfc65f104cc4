"""Evaluate networks on a split of a data set.

    python jobs/evaluate.py --data SHARDS --rgb RUN --flow RUN --output EVALUATION      both streams, logits added
    python jobs/evaluate.py --data SHARDS --model RUN --output EVALUATION               any single network
    ray job submit --working-dir . -- python jobs/evaluate.py …                         the same on a cluster

By the paper's protocol a network sees what its paper lets it see (I3D: the whole video, centre crop, up to 250 frames).
Videos that are missing, quarantined or cannot be decoded count as wrong.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cluster import check_counts, check_precision, connect, count_processors, describe_workers
from jobs.command import locate_output, run_command
from pipelines import records, storage
from pipelines.clips.sampling import PROTOCOLS, EvaluationProtocol, ProtocolName
from pipelines.datasets.video_index import VideoIndex, read_index, with_fold
from pipelines.errors import SettingsError
from pipelines.evaluation.records import EVALUATION, Evaluation
from pipelines.formatting import format_count
from pipelines.records import Values
from pipelines.training.trained_network import Network, hash_weights
from pipelines.training.weights_files import Which

if TYPE_CHECKING:
    from pipelines.evaluation.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a network of each stream, or any single network, on the shards of jobs/extract_flow.py."""

    data: str
    """Shards, on disk or s3://."""
    output: str
    """Folder for the results, on disk or s3://: evaluation.json, scores.parquet and report.html."""
    rgb: str | None = None
    """Network of the RGB stream: a run, a checkpoint or released weights."""
    flow: str | None = None
    """Network of the flow stream, in the same forms. With --rgb, the logits of both are added."""
    model: str | None = None
    """A single network of any kind, such as c3d or fused_two_stream, instead of --rgb and --flow."""
    which: Which = "last"
    """Which checkpoint of a run. best was chosen on the validation split: do not report its accuracy on that split."""

    split: str = "test"
    """Split to evaluate on."""
    annotations: tuple[str, ...] = ()
    """Official annotation files whose splits replace those of the shards."""
    fold: int = 1
    """Official split of --annotations to use: 1, 2 or 3."""
    ignore_missing: bool = False
    """Leave out videos that are missing, quarantined or fail, instead of counting them as wrong."""

    protocol: ProtocolName = "paper"
    """Clips per video: the paper's test, 10 clips spread over the video, or these 10 at 3 crops each."""
    flip: bool = False
    """Score the mirror image of each clip, too."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks. bf16 is faster on processors and GPUs that have it; fp16 needs a GPU."""

    num_workers: int | None = None
    """Number of workers, each on a GPU if there are any. None: one per GPU, or one per CPU without GPUs."""
    num_cpus: int | None = None
    """CPUs of the Ray instance that the job starts on this machine. None: all."""
    num_gpus: int | None = None
    """GPUs to use. None: all; 0: score on CPUs."""

    def __post_init__(self) -> None:
        check_counts(num_workers=self.num_workers, num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        if (self.model is None) == (self.rgb is None and self.flow is None):
            raise SettingsError("give --rgb, --flow or both, or else --model")
        for uri in (self.data, self.output, self.rgb, self.flow, self.model, *self.annotations):
            if uri is not None:
                # For its errors alone: a URI that cannot be meant is refused before any work.
                storage.absolute(uri)


def main() -> None:
    """Parse, evaluate, print."""
    run_command(Evaluate, run, __doc__)


def run(config: Evaluate) -> Evaluation:
    """Evaluate, write the three files, print the table; returns what evaluation.json holds."""
    index = read_index(config.data)
    if config.annotations:
        index = with_fold(index, config.annotations, config.fold)
    index = index.of_split(config.split)
    # Before hours of scoring: it refuses a folder that would be lost.
    output = locate_output(config.output)
    print(
        f"data        {index.data}: {format_count(len(index), 'video')} of split {config.split}, "
        f"{format_count(len(index.classes), 'class')}"
    )
    print(f"ray         {connect(num_cpus=config.num_cpus)}", flush=True)
    # Not at the top: Ray reads its environment when it is imported, and `connect` sets it.
    from pipelines.evaluation import scoring

    scorer = make_scorer(config)
    print(f"scoring     {describe_workers(scorer.precision, scorer.num_workers, use_gpu=scorer.use_gpu)}", flush=True)
    networks = {source.name: source.load() for source in scorer.sources}
    # The workers load them again; here they are loaded to be held against the data before the work.
    for note in scoring.check_networks(index, networks):
        print(f"note        {note}")
    usable = index.usable()
    rows = []
    for row in scoring.score_videos(usable, networks, scorer):
        rows.append(row)
        # About ten lines, however many videos: they also go to `ray job logs`.
        if len(rows) % max(1, len(usable) // 10) == 0:
            print(f"scored      {len(rows):,} of {format_count(len(usable), 'video')}", flush=True)
    table = scoring.tabulate(index, usable, rows, list(networks))
    scoring.check_scored(index, table)
    evaluation = scoring.summarise(
        table,
        list(networks),
        index.classes,
        ignore_missing=config.ignore_missing,
        settings=describe(config, index, scorer, networks),
    )
    write(output, evaluation, table)
    print(f"\n{format_summary(evaluation)}\nlook at     {storage.join(config.output, 'report.html')}")
    return evaluation


def describe(config: Evaluate, index: VideoIndex, scorer: Scorer, loaded: Mapping[str, Network]) -> Values:
    """What evaluation.json says of the settings."""
    division = {"annotations": list(config.annotations), "fold": config.fold} if config.annotations else {}
    protocol = {"name": config.protocol, **asdict(scorer.protocol)}
    # By the weights `export` tells whether an accuracy is that of the network which it writes.
    weights = {name: hash_weights(network.model) for name, network in loaded.items()}
    networks = [{**asdict(source), "weights_sha256": weights[source.name]} for source in scorer.sources]
    return {"data": index.data, "split": config.split, **division, "networks": networks, "protocol": protocol}


def make_scorer(config: Evaluate) -> Scorer:
    """The networks and the workers that score with them."""
    from pipelines.evaluation.scoring import NetworkSource, Scorer

    cpus, gpus = count_processors(config.num_workers, config.num_gpus)
    check_precision(config.precision, gpus)
    given = {"rgb": config.rgb, "flow": config.flow, "model": config.model}
    # --model takes a network of any stream, or of both.
    sources = tuple(
        NetworkSource(
            name=name, uri=storage.absolute(uri), stream=None if name == "model" else name, which=config.which
        )
        for name, uri in given.items()
        if uri is not None
    )
    return Scorer(
        sources=sources,
        protocol=make_protocol(config),
        precision=config.precision,
        num_workers=config.num_workers or gpus or int(cpus),
        use_gpu=gpus > 0,
    )


def make_protocol(config: Evaluate) -> EvaluationProtocol:
    """The named protocol, mirrored clips added where asked for."""
    return replace(PROTOCOLS[config.protocol], flip=config.flip)


def write(output: str, evaluation: Evaluation, table: pa.Table) -> None:
    """scores.parquet, report.html, and evaluation.json last."""
    from pipelines.pages.evaluation import write_evaluation_report

    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.put(storage.join(output, "scores.parquet"), sink.getvalue())
    write_evaluation_report(output, evaluation)
    records.write(storage.join(output, EVALUATION), evaluation)


def format_summary(evaluation: Evaluation) -> str:
    """The figures as a table: each network and their sum, over expected and over evaluated videos."""
    expected, evaluated = evaluation.expected, evaluation.evaluated
    lost = f"{evaluation.missing} missing, {evaluation.quarantined} quarantined, {evaluation.failed} failed"
    lines = [f"evaluated   {evaluated:,} of {format_count(expected, 'video')}; {lost}", ""]
    lines.append(f"{'':18}{f'of {expected} expected':>22}{f'of {evaluated}':>22}")
    lines.append(f"{'':18}{'top-1':>11}{'top-5':>11}{'top-1':>11}{'top-5':>11}")
    for name, figures in evaluation.figures.items():
        # Of one network the sum is that network.
        if name == "fused" and len(evaluation.figures) == 2:
            continue
        shares = [share for of in (figures.of_expected, figures.of_evaluated) for share in (of.top1, of.top5)]
        title = "logits added 1:1" if name == "fused" else name
        lines.append(f"{title:18}" + "".join(f"{_percent(share):>11}" for share in shares))
    lines += ["", f"top-1       {_percent(evaluation.top1)}{_interval(evaluation)}, " + (
        "lost videos left out" if evaluation.ignore_missing else "lost videos counted as wrong")]  # fmt: skip
    if evaluation.not_finite:
        lines.append(f"not finite  scores of {format_count(evaluation.not_finite, 'video')}, which count as wrong")
    lines.append(f"classes     {_percent(evaluation.mean_per_class)} mean top-1 of a class")
    if evaluation.fusion_sweep:
        each = "  ".join(f"{fused.rgb_weight:.1f}: {_percent(fused.top1)}" for fused in evaluation.fusion_sweep)
        lines.append(f"RGB weight  {each}  (chosen on these videos: not a result)")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


def _interval(evaluation: Evaluation) -> str:
    interval = evaluation.top1_interval_95
    return f" (95 %: {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""


if __name__ == "__main__":
    main()
