"""How good networks are on the videos of a split: one Ray Data graph from shards to logits, and figures from those.

Every video that the split should have is counted. What is missing, quarantined or cannot be decoded is wrong, unless
such videos are ignored by request; both figures are always there. Streams are fused by adding their logits with equal
weight (the paper's). Other weights are shown beside it, and that they were tried on the very videos they are shown for.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch

import models
from models import cuda
from models.folding import fold_batch_norm
from models.input_spec import FRAMES_PER_SECOND
from pipelines.clips.numbered import check_storage, is_of_storage, open_row
from pipelines.clips.sampling import EvaluationProtocol, cut_test_frames
from pipelines.clips.tensors import scale_clips
from pipelines.datasets.records import describe_rate
from pipelines.datasets.shards import Row
from pipelines.datasets.video_index import VideoIndex, check_labels
from pipelines.errors import DataError, NetworkError, OutageError, RunError
from pipelines.evaluation import metrics
from pipelines.evaluation.records import Accuracy, Evaluation, FusionAccuracy, NetworkAccuracy
from pipelines.formatting import format_count
from pipelines.media.codec import DECODING_ERRORS, check_convention
from pipelines.ray_data import ON_CPU, quieten
from pipelines.training.trained_network import Network, load_network
from pipelines.training.weights_files import Which

WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))  # rounded: 0.1 × 3 is 0.30000000000000004


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """A network to evaluate: where it lies, and the stream it must be of (None: whatever it sees)."""

    name: str  # "rgb", "flow" or "model"
    uri: str
    stream: str | None = None
    which: Which = "last"

    def load(self) -> Network:
        try:
            return load_network(self.uri, stream=self.stream, which=self.which)
        except NetworkError as error:
            raise NetworkError(f"--{self.name} {error}") from error


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What scores are made with; `use_gpu`: one GPU for each actor."""

    sources: tuple[NetworkSource, ...]
    protocol: EvaluationProtocol
    precision: str = "fp32"
    num_workers: int = 1
    use_gpu: bool = False


def check_networks(index: VideoIndex, networks: Mapping[str, Network]) -> list[str]:
    """What whoever reads the scores should know before.

    Raises NetworkError where a network does not fit the data: other classes, or flow of another convention. Raises
    DataError where the data has no labels to compare with.
    """
    check_labels(index)
    notes = []
    for name, network in networks.items():
        if network.classes is not None and network.classes != index.classes:
            # Not strict: where one list is the beginning of the other the message says so.
            pairs = zip(network.classes, index.classes, strict=False)
            first = next((f"{a!r} there, {b!r} here" for a, b in pairs if a != b), "there are more on one side")
            raise NetworkError(f"--{name} knows other classes than {index.data}: {first}")
        if network.model.config.num_classes != len(index.classes):
            raise NetworkError(
                f"--{name} knows {format_count(network.model.config.num_classes, 'class')}, "
                f"{index.data} has {len(index.classes)}"
            )
        if "flow" in network.streams:
            check_convention(index.convention.flow)
            stored, bound = float(index.convention.flow["bound_px"]), network.settings.bound
            if stored < bound:
                notes.append(
                    f"--{name} takes flow of up to ± {bound:g} px, {index.given or index.data} holds ± {stored:g} px: "
                    "faster motion looks slower than what it has learned"
                )
        trained_at = network.settings.fps or FRAMES_PER_SECOND
        if trained_at != index.sampling.fps:
            notes.append(
                f"--{name} was trained on {describe_rate(trained_at)}, {index.given or index.data} holds "
                f"{index.sampling.describe_rate()}: motion is of another speed than it has learned"
            )
    return notes


class CutVideo:
    """The step from a video's place in the index to the frames of its test clips, for each network and stream."""

    def __init__(self, index: VideoIndex, networks: Mapping[str, Network], protocol: EvaluationProtocol) -> None:
        self.index, self.protocol = index, protocol
        # Not the networks themselves: their weights would travel with the step.
        self.wanted = {name: (network.model.input_spec, network.settings) for name, network in networks.items()}

    def __call__(self, row: Row) -> Row:
        # A task reserves one CPU; OpenCV would take them all.
        cv2.setNumThreads(1)
        video = self.index.row(int(row["id"]))
        # A stream is read and decoded once, however many networks see it.
        streams = sorted({stream for input_spec, _ in self.wanted.values() for stream in input_spec.test.streams})
        try:
            read = open_row(video, streams)
            frames = {stream: read(stream, 0, self._end(stream)) for stream in streams}
            cut = {
                f"{name}.{stream}": clips
                for name, (input_spec, settings) in self.wanted.items()
                for stream, clips in cut_test_frames(frames, input_spec, settings, self.protocol).items()
            }
        except DECODING_ERRORS as error:
            return {"place": int(row["id"]), "error": describe_error(error, self.index.data)}
        return {"place": int(row["id"]), "error": "", **cut}

    def _end(self, stream: str) -> int | None:
        """Frames of a stream that some network can use."""
        if self.protocol.num_clips:
            return None  # clips are spread over the whole video
        tests = [input_spec.test for input_spec, _ in self.wanted.values() if stream in input_spec.test.streams]
        return max(test.num_clips * test.span for test in tests)


class ScoreVideo:
    """The step from frames to logits; keeps its networks, folded, from video to video."""

    def __init__(self, scorer: Scorer) -> None:
        torch.set_num_threads(1)
        self.device, self.refusal = set_up(scorer.precision, use_gpu=scorer.use_gpu)
        self.networks = {source.name: source.load() for source in scorer.sources}
        dtype = cuda.DTYPES[scorer.precision]
        self.models: dict[str, Any] = {
            name: cuda.place(fold_batch_norm(network.model, dtype=dtype), self.device)
            for name, network in self.networks.items()
        }

    def __call__(self, row: Row) -> Row:
        row_scores: Row = {"place": row["place"], "error": row["error"], "refusal": self.refusal}
        for name, network in self.networks.items():
            scored = not row["error"] and not self.refusal
            logits = self._score(name, network, row) if scored else np.zeros(0, np.float32)
            row_scores[f"logits_{name}"] = logits.tolist()
        return row_scores

    def _score(self, name: str, network: Network, row: Row) -> npt.NDArray[np.float32]:
        clips = {}
        for stream in network.streams:
            # A copy: Ray's arrays are views of the object store, which tensors may not write to.
            frames = torch.from_numpy(np.array(row[f"{name}.{stream}"])).to(self.device)
            clips[stream] = scale_clips(stream, frames, network.settings.bound)
        return models.video_scores(self.models[name], clips).cpu().numpy()


def describe_error(error: Exception, data: str | None) -> str:
    """`VideoError: …`: why a video cannot be read, or the OutageError that the data set `data` is away."""
    try:
        if data is not None and is_of_storage(error):
            check_storage(data, error)
    except OutageError as away:
        error = away
    return f"{type(error).__name__}: {error}"[:500]


def set_up(precision: str, *, use_gpu: bool) -> tuple[torch.device, str]:
    """The device of this worker, and why it must not be computed on; nothing where it may.

    The reason goes through the graph as a value, from which `unless_refused` makes one error: raised in an actor it
    would be buried in Ray's account of the actor's death.
    """
    device = torch.device("cuda" if use_gpu else "cpu")
    try:
        cuda.set_up(device, precision, training=False)
    except cuda.ConvolutionError as error:
        return device, str(error)
    return device, ""


def unless_refused(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows without their `refusal`. Raises RunError at the first that has one."""
    for row in rows:
        if refusal := row.pop("refusal"):
            raise RunError(refusal)
        yield row


def unless_away(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows. Raises OutageError at the first whose `error` is one, by `describe_error`."""
    for row in rows:
        # Not raised where it was met: Ray Data would make its own error of it, of which only a traceback is left.
        if row["error"].startswith(OutageError.__name__):
            raise OutageError(row["error"].removeprefix(f"{OutageError.__name__}: "))
        yield row


def score_videos(index: VideoIndex, networks: Mapping[str, Network], scorer: Scorer) -> Iterator[Row]:
    """Logits of each usable video, as rows `place` (in the index), `error`, `logits_NAME`; in no certain order.

    Ray must be running. On CPUs a task decodes and scores; with GPUs decoding is tasks on CPUs of their own. Raises
    OutageError where the data set cannot be reached, RunError where a GPU computes wrong numbers.
    """
    quieten()
    cut = CutVideo(index, networks, scorer.protocol)
    graph = ray.data.range(len(index), override_num_blocks=max(1, min(len(index), 4 * scorer.num_workers)))
    graph = read_and_compute(graph, cut, ScoreVideo, (scorer,), num_workers=scorer.num_workers, use_gpu=scorer.use_gpu)
    yield from unless_away(unless_refused(graph.iter_rows()))


def read_and_compute(
    graph: ray.data.Dataset,
    read: Callable[[Row], Row],
    compute: type,
    given: tuple[Hashable, ...],
    *,
    num_workers: int,
    use_gpu: bool,
) -> ray.data.Dataset:
    """The rows that `compute(*given)` makes of what `read` reads, `num_workers` of them at a time.

    On CPUs in one task; with GPUs in actors with one each, fed by tasks on CPUs of their own.
    """
    if not use_gpu:
        tasks = ray.data.TaskPoolStrategy(size=num_workers)
        step = _ReadAndCompute(read=read, compute=compute, given=given, call=uuid.uuid4().hex)
        return graph.map(step, compute=tasks, **ON_CPU)
    actors = ray.data.ActorPoolStrategy(size=num_workers)
    # No CPU: reading may have taken them all, and the actor would wait for one.
    return graph.map(read, **ON_CPU).map(compute, fn_constructor_args=given, compute=actors, num_cpus=0, num_gpus=1)


@dataclass(frozen=True, kw_only=True)
class _ReadAndCompute:
    """Both steps in one task of a CPU, whose process keeps the networks for the next one of the same `call`.

    A process may outlive that, and what then lies where the networks were may be others.
    """

    read: Callable[[Row], Row]
    compute: type
    given: tuple[Hashable, ...]
    call: str

    def __call__(self, row: Row) -> Row:
        return _kept(self.compute, self.given, self.call)(self.read(row))


@lru_cache(maxsize=1)
def _kept(compute: type, given: tuple[Hashable, ...], call: str) -> Callable[[Row], Row]:
    step: Callable[[Row], Row] = compute(*given)
    return step


def tabulate(index: VideoIndex, usable: VideoIndex, rows: Sequence[Row], names: Sequence[str]) -> pa.Table:
    """scores.parquet: every labelled video that the split should have, with its fate and its logits.

    Columns `id`, `label`, `class_name`, `status` (ok, missing, quarantined, failed), `error`, `logits_NAME`, and of
    their sum `predicted` and `rank` (classes before the true one). Of a video with a score that is not finite,
    `predicted` is null and its class comes last.
    """
    scored = {usable.row(row["place"])["id"]: row for row in rows}
    table: list[Row] = []
    for video in index.table.select(["id", "label", "class_name", "status", "error_kind"]).to_pylist():
        # Without a label it can be neither right nor wrong.
        if video["label"] < 0:
            continue
        row = scored.get(video["id"], {})
        error = row.get("error") or video["error_kind"] or ""
        status = "failed" if row.get("error") else video["status"]
        facts = {"id": video["id"], "label": video["label"], "class_name": video["class_name"]}
        logits = {f"logits_{name}": list(row[f"logits_{name}"]) if status == "ok" else None for name in names}
        table.append(
            {**facts, "status": status, "error": error, **logits, **_place(list(logits.values()), video["label"])}
        )
    # Said, because of a column of nothing but nulls Arrow could not tell the type.
    kinds = {
        "predicted": pa.int32(),
        "rank": pa.int32(),
        **{f"logits_{name}": pa.list_(pa.float32()) for name in names},
    }
    columns = {key: [row[key] for row in table] for key in table[0]}
    return pa.table({key: pa.array(values, kinds.get(key)) for key, values in columns.items()})


def check_scored(index: VideoIndex, table: pa.Table) -> None:
    """DataError where not one video was scored: zero right ones of them would be no score of a network's."""
    fates = Counter(table["status"].to_pylist())
    if not fates["ok"]:
        said = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
        reason = next((f" ({error})" for error in table["error"].to_pylist() if error), "")
        raise DataError(
            f"{index.given or index.data}: none of {format_count(len(table), 'video')} could be scored: "
            f"{said}{reason}. The extraction's report.html says what it holds"
        )


def _place(logits: list[Any], label: int) -> Row:
    if logits[0] is None:
        return {"predicted": None, "rank": None}
    total = np.sum(np.array(logits, np.float32), axis=0)[None]
    # argmax takes NaN for the largest.
    predicted = int(total.argmax()) if np.isfinite(total).all() else None
    return {"predicted": predicted, "rank": int(metrics.ranks(total, np.array([label]))[0])}


def summarise(
    table: pa.Table,
    names: Sequence[str],
    classes: Sequence[str],
    *,
    ignore_missing: bool,
    settings: Mapping[str, object] | None = None,
) -> Evaluation:
    """All figures of an evaluation, from its table of scores; `settings` are what they were made with."""
    status = table["status"].to_pylist()
    scored = table.filter(pa.array([state == "ok" for state in status]))
    labels = np.array(scored["label"].to_pylist(), np.int64)
    logits = {name: _matrix(scored, name, len(classes)) for name in names}
    total = sum(logits.values(), np.zeros((len(labels), len(classes)), np.float32))
    counts = {name: status.count(name) for name in ("missing", "quarantined", "failed")}
    expected, evaluated = len(status), len(labels)
    not_finite = int((~np.isfinite(total).all(axis=1)).sum())
    figures = {name: _figures(scores, labels, expected) for name, scores in (logits | {"fused": total}).items()}
    headline = figures["fused"].of_evaluated if ignore_missing else figures["fused"].of_expected
    matrix = metrics.confusion(total, labels)
    # The lost videos count in their classes too, unless they are ignored.
    counted = labels if ignore_missing else np.array(table["label"].to_pylist(), np.int64)
    shares = metrics.per_class(matrix, np.bincount(counted, minlength=len(classes)).tolist())
    known = [share for share in shares if share is not None]
    count = evaluated if ignore_missing else expected
    return Evaluation(
        expected=expected,
        evaluated=evaluated,
        **counts,
        not_finite=not_finite,
        ignore_missing=ignore_missing,
        top1=headline.top1,
        top5=headline.top5,
        top1_interval_95=metrics.wilson(headline.top1, count) if headline.top1 is not None else None,
        mean_per_class=sum(known) / len(known) if known else None,
        figures=figures,
        per_class=dict(zip(classes, shares, strict=True)),
        confusion=tuple(map(tuple, matrix.tolist())),
        fusion_sweep=tuple(weigh_fusion(logits, labels, count)),
        classes=tuple(classes),
        settings=settings or {},
    )


def _matrix(table: pa.Table, name: str, num_classes: int) -> npt.NDArray[np.float32]:
    return np.array(table[f"logits_{name}"].to_pylist(), np.float32).reshape(-1, num_classes)


def _figures(scores: metrics.Scores, labels: metrics.Labels, expected: int) -> NetworkAccuracy:
    """Top-1 and top-5 with lost videos wrong, and without them."""
    of_expected, of_evaluated = (
        Accuracy(top1=metrics.top(1, scores, labels, count), top5=metrics.top(5, scores, labels, count))
        for count in (expected, len(labels))
    )
    return NetworkAccuracy(of_expected=of_expected, of_evaluated=of_evaluated)


def weigh_fusion(logits: Mapping[str, metrics.Scores], labels: metrics.Labels, count: int) -> list[FusionAccuracy]:
    """Top-1 at each weight of RGB's logits, 1 - weight of flow's; none where there are not these two."""
    # Of one network, or of one that sees both streams, there is nothing to weigh.
    if set(logits) != {"rgb", "flow"}:
        return []
    mixed = {weight: weight * logits["rgb"] + (1 - weight) * logits["flow"] for weight in WEIGHTS}
    return [
        FusionAccuracy(rgb_weight=weight, top1=metrics.top(1, scores, labels, count))
        for weight, scores in mixed.items()
    ]
