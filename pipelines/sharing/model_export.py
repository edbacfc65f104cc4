"""A trained network as a folder to share: weights, description, and a card that says what it is and how good it is.

    OUT/model.safetensors   parameters and running statistics, float32
    OUT/config.json         the network's settings, its classes, how clips are cut, the flow convention
    OUT/README.md           the card

Every job that takes a network takes this folder. What a run says of where its data lay stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import models
from models import checkpoint
from models.input_spec import FRAMES_PER_SECOND
from models.video_model import VideoModel
from pipelines import records, storage
from pipelines.clips.sampling import FLOW_BOUND
from pipelines.errors import DataError, NetworkError
from pipelines.evaluation import metrics
from pipelines.evaluation.records import EVALUATION, Accuracy, Evaluation
from pipelines.formatting import format_count
from pipelines.sharing import cards
from pipelines.training.records import RESULT, RUN, RunRecord, RunResult
from pipelines.training.trained_network import hash_weights, load_network
from pipelines.training.weights_files import Which, find_checkpoint, local_checkpoint

TITLES = {"i3d": "I3D", "c3d": "C3D", "convnet_lstm": "ConvNet+LSTM", "two_stream": "Two-Stream"}


@dataclass(frozen=True, kw_only=True)
class ModelExport:
    """What is exported: a checkpoint of a run, with the accuracy that an evaluation of it found."""

    run: str  # absolute URI of a run or a checkpoint
    which: Which = "last"
    evaluation: str | None = None
    said: cards.Said


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a network did in an evaluation."""

    evaluation: Evaluation
    figures: Mapping[str, Accuracy]  # "expected", "evaluated"

    @property
    def split(self) -> str:
        return str(self.evaluation.settings.get("split", "test"))

    def describe_protocol(self) -> str:
        """`paper: the network's own test clips, centre crop`: what else decides about the figure."""
        protocol = self.evaluation.settings.get("protocol")
        values = dict(protocol) if isinstance(protocol, Mapping) else {}
        clips = format_count(values["num_clips"], "clip") if values.get("num_clips") else "the network's own test clips"
        mirrored = ", mirrored ones too" if values.get("flip") else ""
        crops = "3 crops" if values.get("num_crops") == 3 else "centre crop"
        return f"{values.get('name', 'unknown')}: {clips}, {crops}{mirrored}"


def export_model(export: ModelExport, folder: Path) -> str:
    """Writes the folder; returns the card. Raises NetworkError, and DataError for an evaluation of another network."""
    model, metadata = _load(export)
    score = None if export.evaluation is None else read_score(export, hash_weights(model))
    run = _read_run(export.run)
    # What a checkpoint tells of its run names places that are nobody else's business.
    checkpoint.save(folder, model, replace(metadata, extra={}), layout=checkpoint.HUB)
    card = describe_model(export, model, metadata, run, score)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def _load(export: ModelExport) -> tuple[VideoModel, checkpoint.Metadata]:
    network = load_network(export.run, which=export.which)  # for its errors, and its check for values that diverged
    if network.classes is None:
        raise NetworkError(
            f"{export.run} holds released weights, which are shared already: give a run, or a checkpoint of one"
        )
    with local_checkpoint(find_checkpoint(export.run, export.which)) as path:
        return checkpoint.load(path)


def _read_run(uri: str) -> RunRecord | None:
    """What a run says of its training; None for a checkpoint alone."""
    known = storage.exists(storage.join(uri, RESULT)) and storage.exists(storage.join(uri, RUN))
    return records.read(storage.join(uri, RUN), RunRecord) if known else None


def read_score(export: ModelExport, sha256: str) -> Score:
    """The accuracy of the network with this hash of weights. Raises DataError where the evaluation is of others."""
    assert export.evaluation is not None
    evaluation = records.read(storage.join(export.evaluation, EVALUATION), Evaluation)
    networks = evaluation.settings.get("networks")
    rows = [dict(row) for row in networks if isinstance(row, Mapping)] if isinstance(networks, list | tuple) else []
    for row in rows:
        # Not by where it lies: a network may have been trained anew there since.
        if row.get("weights_sha256") == sha256:
            figures = evaluation.figures[str(row["name"])]
            accuracy = {"expected": figures.of_expected, "evaluated": figures.of_evaluated}
            return Score(evaluation=evaluation, figures=accuracy)
    named = ", ".join(f"{row.get('uri')} ({row.get('which', 'last')})" for row in rows) or "unknown networks"
    raise DataError(
        f"{export.evaluation} is an evaluation of {named}, not of the {export.which} checkpoint of {export.run}: its "
        "accuracy would be another network's. Evaluate this one, or leave --evaluation out"
    )


def describe_model(
    export: ModelExport, model: VideoModel, metadata: checkpoint.Metadata, run: RunRecord | None, score: Score | None
) -> str:
    """The card."""
    name = models.name_of(model.config)
    streams = " and ".join(model.input_spec.test.streams)
    dataset = export.said.dataset or "a data set that was not named"
    count = format_count(len(metadata.classes), "class")
    return cards.join_sections(
        [
            cards.front_matter(_metadata(export, model, score)),
            f"# {export.said.name}",
            f"{TITLES.get(name, name)} on {streams}, {count}, trained on {dataset} by {cards.PROJECT}. The method is "
            f"that of Carreira and Zisserman, *Quo Vadis, Action Recognition?* ([arXiv:{cards.PAPER}]"
            f"(https://arxiv.org/abs/{cards.PAPER})).",
            _accuracy_section(score, dataset),
            _training_section(export, run, dataset),
            _input_section(model, metadata),
            _flow_section(metadata),
            f"## Load it\n\nIn a checkout of {cards.PROJECT}:\n\n"
            f"{cards.code(loading_code(export.said.repo, model))}\n\n"
            "Its jobs take the folder as they take a run, as in `python jobs/predict.py VIDEO "
            f"--{next(iter(model.input_spec.test.streams))} FOLDER`.",
            cards.licence_section(export.said.licence),
        ]
    )


def _metadata(export: ModelExport, model: VideoModel, score: Score | None) -> dict[str, object]:
    kind, streams = models.name_of(model.config), model.input_spec.test.streams
    return {
        "license": export.said.licence,
        "library_name": cards.PROJECT,
        "pipeline_tag": "video-classification",
        "tags": ["action-recognition", kind, *streams],
        "model-index": [] if score is None else [{"name": export.said.name, "results": [_result(export, score)]}],
    }


def _result(export: ModelExport, score: Score) -> dict[str, object]:
    """What the hub shows as evaluation results; of all expected videos, as the card's first column."""
    dataset = export.said.dataset or "unnamed"
    shares = {"top-1": score.figures["expected"].top1, "top-5": score.figures["expected"].top5}
    return {
        "task": {"type": "video-classification"},
        "dataset": {"name": dataset, "type": dataset.lower().replace(" ", "-"), "split": score.split},
        "metrics": [
            {"type": "accuracy", "name": f"{name} of {score.evaluation.expected} expected videos", "value": share}
            for name, share in shares.items()
            if share is not None
        ],
    }


def _accuracy_section(score: Score | None, dataset: str) -> str:
    if score is None:
        return "## Accuracy\n\nIt was not evaluated: no accuracy is claimed."
    found = score.evaluation
    expected, evaluated = score.figures["expected"], score.figures["evaluated"]
    rows = [
        ("", f"of {found.expected:,} expected videos", f"of {found.evaluated:,} evaluated videos"),
        ("top-1", _percent(expected.top1, found.expected), _percent(evaluated.top1, found.evaluated)),
        ("top-5", _percent(expected.top5, found.expected), _percent(evaluated.top5, found.evaluated)),
    ]
    lost = f"{found.missing:,} missing, {found.quarantined:,} undecodable and {found.failed:,} failed"
    return (
        f"## Accuracy\n\n{cards.table(rows)}\n\nSplit {score.split} of {dataset}. Protocol "
        f"{score.describe_protocol()}. In brackets the 95 % interval. Of the expected videos {lost} ones are wrong."
    )


def _percent(share: float | None, count: int) -> str:
    if share is None:
        return "n/a"
    low, high = metrics.wilson(share, count)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def _training_section(export: ModelExport, run: RunRecord | None, dataset: str) -> str:
    if run is None:
        return ""
    result = records.read(storage.join(export.run, RESULT), RunResult)
    rows = [
        ("", ""),
        ("data set", dataset),
        ("videos", f"{run.train_videos:,} to train on, {run.validation_videos:,} to validate"),
        ("initial weights", run.initial.split(" ")[0] or "unknown"),  # what follows is a path
        ("checkpoint", f"the {export.which} one" + (", chosen by validation" if export.which == "best" else "")),
        ("seed", run.seed),
        *((key, value) for key, value in run.optimisation.items() if isinstance(value, str | int | float)),
    ]
    steps = result.number("step")
    if steps is not None:
        rows.append(("steps", f"{steps:,.0f}"))
    return f"## Training\n\n{cards.table(rows)}"


def _input_section(model: VideoModel, metadata: checkpoint.Metadata) -> str:
    spec, clips = model.input_spec, metadata.clips
    fps = clips.get("fps", FRAMES_PER_SECOND)
    rate = "videos at their own rate" if fps == "native" else f"videos at {fps:g} fps"
    lines = [
        f"* {name}: clips (batch, {sampling.channels}, frames, {spec.size}, {spec.size}) in [-1, 1], "
        f"{format_count(sampling.num_frames, 'frame')} at test{_every(sampling.frame_step)}, of {rate}"
        for name, sampling in spec.test.streams.items()
    ]
    if "rgb" in spec.test.streams:
        lines.append("* RGB is scaled by x / 127.5 - 1")
    if "flow" in spec.test.streams:
        lines.append(
            f"* flow is clipped to ± {clips.get('flow_bound', FLOW_BOUND):g} px and divided by that, u before v"
        )
    resized = f"the shorter side is {spec.shorter_side} px"
    resized = f"both sides are {spec.shorter_side} px" if clips.get("resize") == "square" else resized
    lines.append(f"* frames are resized so that {resized}, then the centre is cut out")
    return "## Input\n\n" + "\n".join(lines)


def _every(step: int) -> str:
    return f", one of every {step}" if step > 1 else ""


def _flow_section(metadata: checkpoint.Metadata) -> str:
    if metadata.flow_convention is None:
        return ""
    rows = [("", ""), *metadata.flow_convention.items()]
    return (
        "## Flow convention\n\nHow the flow that it was trained on was computed and stored: flow of another convention "
        f"is another input.\n\n{cards.table(rows)}"
    )


def loading_code(repo: str | None, model: VideoModel) -> str:
    """The lines of the card that load the network and run it once."""
    spec = model.input_spec
    clips = ", ".join(
        f'"{name}": torch.zeros(1, {sampling.channels}, {sampling.num_frames}, {spec.size}, {spec.size})'
        for name, sampling in spec.test.streams.items()
    )
    return f"""
import torch
from models import checkpoint, clip_scores
{cards.folder_code(repo, "model")}
model, metadata = checkpoint.load(folder)
clips = {{{clips}}}  # in [-1, 1]
with torch.no_grad():
    logits = clip_scores(model.eval()(clips))[0]
print(metadata.classes[int(logits.argmax())])
"""
