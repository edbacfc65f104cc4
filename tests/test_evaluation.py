"""What an evaluation counts, worked out by hand, and the whole way from shards to a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fixtures_jobs import NO_GPUS, run_here, succeed

import models
from jobs.evaluate import format_summary
from jobs.report import make_report
from models import checkpoint, cuda
from models.checkpoint import Metadata
from pipelines import records
from pipelines.clips.sampling import ClipSettings, EvaluationProtocol
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import DataError, NetworkError
from pipelines.evaluation import scoring
from pipelines.pages.evaluation import render_evaluation
from pipelines.pages.mistakes import choose_mistakes
from pipelines.training.trained_network import Network, load_network


@pytest.fixture
def index(motion_shards: str) -> VideoIndex:
    return read_index(motion_shards).of_split("test")


def right_for(index: VideoIndex, place: int, *, error: str = "") -> dict[str, Any]:
    """A row whose RGB says the true class, and whose flow says the next one, a little louder."""
    label = index.usable().row(place)["label"]
    rgb, flow = np.zeros(6), np.zeros(6)
    rgb[label], flow[(label + 1) % 6] = 2, 3
    return {"place": place, "error": error, "logits_rgb": rgb.tolist(), "logits_flow": flow.tolist()}


def test_every_expected_video_is_counted(index: VideoIndex) -> None:
    rows = [right_for(index, place, error="cut short" if place == 5 else "") for place in range(6)]
    table = scoring.tabulate(index, index.usable(), rows, ["rgb", "flow"])
    assert len(table) == 8
    evaluation = scoring.summarise(table, ["rgb", "flow"], index.classes, ignore_missing=False)
    counts = {name: getattr(evaluation, name) for name in ("expected", "evaluated", "missing", "quarantined", "failed")}
    assert counts == {"expected": 8, "evaluated": 5, "missing": 1, "quarantined": 1, "failed": 1}
    assert evaluation.figures["rgb"].of_expected.top1 == 5 / 8
    assert evaluation.figures["rgb"].of_evaluated.top1 == 1
    assert evaluation.figures["flow"].of_evaluated.top1 == 0
    assert evaluation.top1 == evaluation.figures["fused"].of_expected.top1 == 0
    assert "cut short" in table["error"].to_pylist()


def test_lost_videos_can_be_left_out_of_the_headline(index: VideoIndex) -> None:
    rows = [right_for(index, place) for place in range(6)]
    table = scoring.tabulate(index, index.usable(), rows, ["rgb"])
    left_out = scoring.summarise(table, ["rgb"], index.classes, ignore_missing=True)
    counted = scoring.summarise(table, ["rgb"], index.classes, ignore_missing=False)
    assert (left_out.top1, counted.top1) == (1, 6 / 8)
    assert left_out.mean_per_class == 1
    assert counted.per_class["left"] == 0.5
    assert counted.per_class["down"] == 1


def test_scores_that_are_not_finite_are_wrong_and_counted(index: VideoIndex, tmp_path: Path) -> None:
    rows = [right_for(index, place) for place in range(6)]
    for place in (2, 4):
        rows[place]["logits_rgb"] = [float("nan")] * 6
    table = scoring.tabulate(index, index.usable(), rows, ["rgb"])
    found = scoring.summarise(table, ["rgb"], index.classes, ignore_missing=True)
    assert (found.evaluated, found.not_finite, found.top1) == (6, 2, 4 / 6)
    assert sum(found.per_class.values()) == 4  # each class has one video
    assert table["predicted"].to_pylist().count(None) == 4  # these two, a missing and a quarantined one
    assert "not finite  scores of 2 videos" in format_summary(found)
    assert choose_mistakes(table, 6) == []


def test_a_network_that_has_diverged_is_refused(index: VideoIndex, tmp_path: Path) -> None:
    folder = Path(save_network(tmp_path, "rgb", index.classes))
    model, metadata = checkpoint.load(folder)
    model.logits.bias.data[1] = float("nan")  # type: ignore[union-attr, index]
    checkpoint.save(folder, model, metadata)
    with pytest.raises(NetworkError, match=r"logits.bias has values that are infinite or not a number"):
        load_network(str(folder))


def test_storage_that_is_away_is_no_wrong_answer(index: VideoIndex, tmp_path: Path) -> None:
    away = str(tmp_path / "away")
    files = [file and file.replace(index.data, away) for file in index.table["file"].to_pylist()]
    column = index.table.schema.get_field_index("file")
    usable = replace(index, data=away, table=index.table.set_column(column, "file", pa.array(files))).usable()
    model = models.build("i3d", num_classes=6, stream="rgb", width=0.125, size=32, frames=16)
    networks = {"rgb": Network(model=model)}
    row = scoring.CutVideo(usable, networks, EvaluationProtocol())({"id": 0})
    assert row["error"].startswith(f"OutageError: {away} cannot be read")
    # The data set answers, and only this shard is gone.
    row = scoring.CutVideo(replace(usable, data=index.data), networks, EvaluationProtocol())({"id": 0})
    assert "FileNotFoundError" in row["error"]


def test_an_accuracy_of_no_video_at_all_is_refused(index: VideoIndex) -> None:
    usable = index.usable()
    rows = [{"place": n, "error": "FileNotFoundError: gone", "logits_rgb": []} for n in range(len(usable))]
    table = scoring.tabulate(index, usable, rows, ["rgb"])
    with pytest.raises(DataError, match=r"none of 8 videos could be scored: .*failed.*\(FileNotFoundError: gone\)"):
        scoring.check_scored(index, table)
    rows[0] |= {"error": "", "logits_rgb": [0.0] * 6}
    scoring.check_scored(index, scoring.tabulate(index, usable, rows, ["rgb"]))


def test_a_split_without_labels_is_refused(index: VideoIndex) -> None:
    column = index.table.schema.get_field_index("label")
    unlabelled = replace(index, table=index.table.set_column(column, "label", pa.array([-1] * 8, pa.int32())))
    with pytest.raises(DataError, match="has no labels on 8 videos"):
        scoring.check_networks(unlabelled, {})


def test_the_weights_of_fusion_end_at_each_stream_alone(index: VideoIndex) -> None:
    table = scoring.tabulate(index, index.usable(), [right_for(index, place) for place in range(6)], ["rgb", "flow"])
    evaluation = scoring.summarise(table, ["rgb", "flow"], index.classes, ignore_missing=True)
    top1 = {fused.rgb_weight: fused.top1 for fused in evaluation.fusion_sweep}
    assert (len(top1), top1[0.0], top1[1.0]) == (11, 0, 1)
    assert top1[0.5] == evaluation.figures["fused"].of_evaluated.top1 == 0
    assert top1[0.7] == 1  # 0.7 × 2 over 0.3 × 3


def test_a_page_of_hostile_names_is_escaped(index: VideoIndex) -> None:
    table = scoring.tabulate(index, index.usable(), [right_for(index, place) for place in range(6)], ["rgb"])
    classes = ("<script>alert(1)</script>", *index.classes[1:])
    evaluation = scoring.summarise(table, ["rgb"], classes, ignore_missing=False)
    page = render_evaluation("out", evaluation, table, [])
    assert "<script>alert" not in page


def test_the_page_made_again_keeps_the_order_of_the_classes(index: VideoIndex, tmp_path: Path) -> None:
    table = scoring.tabulate(index, index.usable(), [right_for(index, place) for place in range(6)], ["rgb"])
    classes = ("zebra", *index.classes[1:])  # comes last in JSON's sorted per_class
    evaluation = scoring.summarise(table, ["rgb"], classes, ignore_missing=False)
    records.write(str(tmp_path / "evaluation.json"), evaluation)
    page = Path(make_report(str(tmp_path))).read_text()
    assert page == render_evaluation(str(tmp_path), evaluation, None, None)
    assert page.index(">zebra</span></th>") < page.index(f">{classes[1]}</span></th>")


def save_network(folder: Path, stream: str, classes: tuple[str, ...]) -> str:
    torch.manual_seed(0)
    model = models.build("i3d", num_classes=len(classes), stream=stream, width=0.125, size=32, frames=16)
    clips = ClipSettings(short_side=40).to_json()
    checkpoint.save(folder / stream, model, Metadata(classes=classes, clips=clips))
    return str(folder / stream)


def test_networks_that_do_not_fit_are_refused(index: VideoIndex, tmp_path: Path) -> None:
    shuffled = load_network(save_network(tmp_path, "rgb", index.classes[::-1]), stream="rgb")
    with pytest.raises(NetworkError, match=r"other classes than .*'up' there, 'down' here"):
        scoring.check_networks(index, {"rgb": shuffled})
    nameless = Network(model=models.build("i3d", num_classes=3, width=0.125, size=32, frames=16))
    with pytest.raises(NetworkError, match=r"knows 3 classes, .* has 6"):
        scoring.check_networks(index, {"rgb": nameless})
    with pytest.raises(NetworkError, match="network of rgb, needed is one of flow"):
        load_network(str(tmp_path / "rgb"), stream="flow")


def test_scores_of_frames_at_another_rate_come_with_a_word(index: VideoIndex, tmp_path: Path) -> None:
    network = load_network(save_network(tmp_path, "rgb", index.classes), stream="rgb")
    assert scoring.check_networks(index, {"rgb": network}) == []
    native = replace(index, sampling=replace(index.sampling, fps="native"))
    (note,) = scoring.check_networks(native, {"rgb": network})
    assert note.startswith("--rgb was trained on 25 frames a second, ")
    settings = network.settings.of_frames(native.sampling)
    assert scoring.check_networks(native, {"rgb": replace(network, settings=settings)}) == []


@pytest.mark.parametrize(("stored", "words"), [(20.0, []), (8.0, ["takes flow of up to ± 20 px"])])
def test_flow_that_was_cut_off_comes_with_a_word(index: VideoIndex, stored: float, words: list[str]) -> None:
    network = Network(model=models.build("i3d", num_classes=6, stream="flow", width=0.125, size=32, frames=16))
    convention = replace(index.convention, flow={**index.convention.flow, "bound_px": stored})
    notes = scoring.check_networks(replace(index, convention=convention), {"flow": network})
    assert [any(word in note for note in notes) for word in words] == [True] * len(words)
    assert len(notes) == len(words)


def test_networks_are_kept_for_one_call_and_no_longer() -> None:
    """A worker's process lives on, and by the next call another network may lie in the same place."""
    made: list[str] = []

    class Step:
        def __init__(self, uri: str) -> None:
            made.append(uri)

        def __call__(self, row: dict[str, int]) -> dict[str, int]:
            return row

    def steps(call: str) -> Any:
        return scoring._ReadAndCompute(read=lambda row: row, compute=Step, given=("uri",), call=call)

    for call in ("first", "first", "second"):
        assert steps(call)({"id": 1}) == {"id": 1}
    assert len(made) == 2


def test_a_gpu_that_computes_wrong_ends_an_evaluation_in_one_sentence(
    index: VideoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise cuda.ConvolutionError("conv3d in bf16 is off by 0.4")

    source = scoring.NetworkSource(name="rgb", uri=save_network(tmp_path, "rgb", index.classes), stream="rgb")
    monkeypatch.setattr(cuda, "set_up", refuse)
    scorer = scoring.ScoreVideo(scoring.Scorer(sources=(source,), protocol=EvaluationProtocol()))
    row = scorer({"place": 3, "error": ""})
    assert row == {"place": 3, "error": "", "refusal": "conv3d in bf16 is off by 0.4", "logits_rgb": []}
    with pytest.raises(ValueError, match=r"^conv3d in bf16 is off by 0.4$"):
        list(scoring.unless_refused([{"place": 0, "refusal": ""}, row]))


def test_evaluate_writes_what_it_prints_and_agrees_with_predict(
    motion_shards: str, index: VideoIndex, tmp_path: Path
) -> None:
    flags = [f"--{stream}={save_network(tmp_path, stream, index.classes)}" for stream in ("rgb", "flow")]
    printed = succeed("evaluate", "--data", motion_shards, *flags, "--output", tmp_path / "out", *NO_GPUS)
    assert "evaluated   6 of 8 videos; 1 missing, 1 quarantined, 0 failed" in printed
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert f"top-1       {found['top1']:.1%}" in printed
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert [row["status"] for row in scores].count("ok") == 6
    row = next(row for row in scores if row["id"] == "test~up~up_0002")
    video = Path(motion_shards).parent / "videos" / "test" / "up" / "up_0002.mp4"
    predicted = succeed("predict", video, *flags, "--top", "6")
    table = predicted.rsplit("\n\n", 1)[1].splitlines()[1:]
    found_by_class = {line.split()[-1]: [float(value) for value in line.split()[2:4]] for line in table}
    for label, name in enumerate(index.classes):  # stored frames and flow differ from raw ones by the codecs
        assert found_by_class[name] == pytest.approx([row["logits_flow"][label], row["logits_rgb"][label]], abs=0.25)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rgb", "none", "--split", "val"], "no split 'val': choose one of test, train"),
        (["--rgb", "."], "no model.json lies in it"),
    ],
)
def test_mistakes_are_one_line(motion_shards: str, tmp_path: Path, words: list[str], message: str) -> None:
    done = run_here("evaluate", "--data", motion_shards, "--output", tmp_path / "out", *words, *NO_GPUS)
    assert done.returncode == 1
    assert message in done.stderr
