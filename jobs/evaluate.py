"""Say how good networks are on a split of a data set, honestly.

    python jobs/evaluate.py --data SHARDS --rgb RUN --flow RUN --output EVALUATION      both streams, logits added
    python jobs/evaluate.py --data SHARDS --model RUN --output EVALUATION               any single network
    ray job submit --working-dir . -- python jobs/evaluate.py …                         the same on a cluster

By the paper's protocol a network sees what its paper lets it see (I3D: the whole video, centre crop, up to 250 frames).
Videos that are missing, quarantined or cannot be decoded count as wrong.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from jobs.cluster import check_precision, connect, count_processors, describe_workers
from jobs.command import locate_output, run_command
from pipelines import storage
from pipelines.clips.sampling import PROTOCOLS, Protocol, ProtocolName
from pipelines.datasets import shards
from pipelines.datasets.video_index import read_index, with_fold
from pipelines.training.weights_files import Which

if TYPE_CHECKING:
    from pipelines.evaluation.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a network of each stream, or any single network, on the shards of jobs/extract_flow.py."""

    data: str
    """Shards, on disk or s3://."""
    output: str
    """Folder for evaluation.json, scores.parquet and report.html, on disk or s3://."""
    rgb: str | None = None
    """Network of the RGB stream: a run, a checkpoint, or released weights."""
    flow: str | None = None
    """Network of the flow stream, likewise; with --rgb their logits are added."""
    model: str | None = None
    """Instead: a network of any kind, such as c3d or fused_two_stream."""
    which: Which = "last"
    """Of a run its last checkpoint, or the best on its validation split (no honest choice if that is evaluated)."""

    split: str = "test"
    """Split to evaluate on."""
    annotations: tuple[str, ...] = ()
    """Official annotation files whose division is used in place of that of the shards."""
    fold: int = 1
    """Division of --annotations: 1, 2 or 3."""
    ignore_missing: bool = False
    """Leave out videos that are missing, quarantined or fail, in place of counting them as wrong."""

    protocol: ProtocolName = "paper"
    """What of a video is seen: the paper's test, 10 clips spread over the video, or those at 3 crops."""
    flip: bool = False
    """See each clip mirrored as well."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 is faster where the processor or GPU has it; fp16 is for GPUs. fp32 is without TensorFloat-32."""

    num_workers: int | None = None
    """Scoring workers, each with a GPU where there are some. None: all GPUs, else all CPUs."""
    num_cpus: int | None = None
    """CPUs of a Ray that is started here. None: all."""
    num_gpus: int | None = None
    """0: score on CPUs though there are GPUs."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.rgb is None and self.flow is None):
            raise ValueError("give --rgb, --flow or both, or else --model")
        for uri in (self.data, self.output, self.rgb, self.flow, self.model, *self.annotations):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, evaluate, print."""
    run_command(Evaluate, run, __doc__)


def run(config: Evaluate) -> dict[str, Any]:
    """Evaluate, write the three files, print the table; returns what evaluation.json holds."""
    index = read_index(config.data)
    if config.annotations:
        index = with_fold(index, config.annotations, config.fold)
    index = index.of_split(config.split)
    output = locate_output(config.output)
    print(f"data        {index.data}: {len(index):,} videos of split {config.split}, {len(index.classes)} classes")
    print(f"ray         {connect(num_cpus=config.num_cpus)}", flush=True)
    from pipelines.evaluation import scoring

    scorer = make_scorer(config)
    print(f"scoring     {describe_workers(scorer.precision, scorer.num_workers, use_gpu=scorer.use_gpu)}", flush=True)
    networks = {entry.name: entry.load() for entry in scorer.entries}
    scoring.check_networks(index, networks)
    usable = index.usable()
    rows = []
    for row in scoring.score_videos(usable, networks, scorer):
        rows.append(row)
        if len(rows) % max(1, len(usable) // 10) == 0:
            print(f"scored      {len(rows):,} of {len(usable):,} videos", flush=True)
    table = scoring.tabulate(index, usable, rows, list(networks))
    found = scoring.summarise(table, list(networks), index.classes, ignore_missing=config.ignore_missing)
    found["classes"] = list(index.classes)  # in the confusion matrix's order, which per_class loses in JSON
    division = {"annotations": list(config.annotations), "fold": config.fold} if config.annotations else {}
    found["settings"] = {"data": index.data, "split": config.split, **division, **scoring.describe(scorer)}
    found["settings"]["protocol"] = {"name": config.protocol, **found["settings"]["protocol"]}
    write(output, found, table)
    print(f"\n{format_summary(found)}\nlook at     {storage.join(output, 'report.html')}")
    return found


def make_scorer(config: Evaluate) -> Scorer:
    """The networks and the workers that score with them."""
    from pipelines.evaluation.scoring import Entry, Scorer

    cpus, gpus = count_processors(config.num_workers, config.num_gpus)
    check_precision(config.precision, gpus)
    given = {"rgb": config.rgb, "flow": config.flow, "model": config.model}
    entries = tuple(
        Entry(name=name, uri=storage.absolute(uri), stream=None if name == "model" else name, which=config.which)
        for name, uri in given.items()
        if uri is not None
    )
    return Scorer(
        entries=entries,
        protocol=make_protocol(config),
        precision=config.precision,
        num_workers=config.num_workers or gpus or int(cpus),
        use_gpu=gpus > 0,
    )


def make_protocol(config: Evaluate) -> Protocol:
    """The named protocol, mirrored clips added where asked for."""
    return replace(PROTOCOLS[config.protocol], flip=config.flip)


def write(output: str, found: dict[str, Any], table: Any) -> None:
    """scores.parquet, report.html, and evaluation.json last."""
    from pipelines.pages.evaluation import write_evaluation_report

    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.put(storage.join(output, "scores.parquet"), sink.getvalue())
    write_evaluation_report(output, found)
    storage.put(storage.join(output, "evaluation.json"), shards.to_json(found))


def format_summary(found: dict[str, Any]) -> str:
    """The figures as a table: each network and their sum, over expected and over evaluated videos."""
    lost = ", ".join(f"{found[name]} {name}" for name in ("missing", "quarantined", "failed"))
    lines = [f"evaluated   {found['evaluated']:,} of {found['expected']:,} videos; {lost}", ""]
    lines.append(f"{'':18}{'of ' + str(found['expected']) + ' expected':>22}{'of ' + str(found['evaluated']):>22}")
    lines.append(f"{'':18}{'top-1':>11}{'top-5':>11}{'top-1':>11}{'top-5':>11}")
    for name, figures in found["figures"].items():
        if name == "fused" and len(found["figures"]) == 2:
            continue
        shares = [figures[kind][k] for kind in ("of_expected", "of_evaluated") for k in ("top1", "top5")]
        title = "logits added 1:1" if name == "fused" else name
        lines.append(f"{title:18}" + "".join(f"{_percent(share):>11}" for share in shares))
    lines += ["", f"top-1       {_percent(found['top1'])}{_interval(found)}, " + (
        "lost videos left out" if found["ignore_missing"] else "lost videos counted as wrong")]  # fmt: skip
    lines.append(f"classes     {_percent(found['mean_per_class'])} mean top-1 of a class")
    if found["fusion_sweep"]:
        each = "  ".join(f"{row['rgb_weight']:.1f}: {_percent(row['top1'])}" for row in found["fusion_sweep"])
        lines.append(f"RGB weight  {each}  (chosen on these videos: not a result)")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


def _interval(found: dict[str, Any]) -> str:
    interval = found["top1_interval_95"]
    return f" (95 %: {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""


if __name__ == "__main__":
    main()
