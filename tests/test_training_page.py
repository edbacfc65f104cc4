"""The page of a training: from a run's files alone, finished or not."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import models
from jobs import report
from models import checkpoint
from pipelines.training_page import draw_filters, first_filters


def make_run(folder: Path, *, finished: bool = True) -> Path:
    """A run's folder with twenty logged steps and a flow I3D of 8 first filters."""
    config = models.configure("i3d", num_classes=3, stream="flow", width=0.125, size=32, frames=16)
    run = {
        "model": {"name": "i3d", "stream": "flow"},
        "data": "<b>data</b>",
        "train_videos": 12,
        "validation_videos": 6,
    }
    train = {"clips": 8, "epoch": 1.0, "learning_rate": 0.1, "top1": 0.5, "clips_per_s": 9.5, "wait_share": 0.01}
    lines = [
        {"kind": "train", "step": step, "loss": 2 / step, **train, "failed": int(step == 3)} for step in range(1, 20)
    ]
    lines[2]["errors"] = ["train~x: FileNotFoundError: gone"]
    lines += [{"kind": "validation", "step": step, "val_loss": 1.0, "val_top1": 0.4} for step in (10, 19)]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        checkpoint.save(folder / "last", models.build_from(config), checkpoint.Metadata(classes=("a", "b", "c")))
        metrics = {"step": 19, "val_top1": 0.4}
        (folder / "result.json").write_text(json.dumps({"last": "last", "best": "last", "metrics": metrics}))
    return folder


def test_a_finished_run_shows_curves_filters_and_what_failed(tmp_path: Path) -> None:
    page = Path(report.make_report(str(make_run(tmp_path / "run")))).read_text()
    assert "40.0% of the validation videos are right after 19 steps" in page
    assert page.count("<svg") == 7
    assert "data:image/png;base64," in page
    assert "train~x: FileNotFoundError: gone" in page
    assert "&lt;b&gt;data&lt;/b&gt;" in page


def test_an_unfinished_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    page = Path(report.make_report(str(make_run(tmp_path / "run", finished=False)))).read_text()
    assert "unfinished, at step 19" in page
    assert "conv1" not in page.split("<h2>Settings")[0].split("</style>")[1]


def test_a_run_that_was_only_begun_has_one_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    (folder / "metrics.jsonl").unlink()
    assert "not a step is logged yet" in Path(report.make_report(str(folder))).read_text()


@pytest.mark.parametrize(("channels", "flow"), [(3, False), (2, True)])
def test_filters_lie_in_one_square_for_each_time_step(channels: int, flow: bool) -> None:
    filters = np.zeros((64, 7, 7, 7, channels), np.float32)
    filters[63, 6, 3, 3, 0] = 1  # red, or motion to the right: red on the wheel
    image = cv2.imdecode(np.frombuffer(draw_filters(filters, flow=flow), np.uint8), cv2.IMREAD_UNCHANGED)
    square = (8 * 8 + 1) * 5
    assert image.shape == (square, 7 * (square + 10), 4)
    neutral = [255, 255, 255, 255] if flow else [128, 128, 128, 255]
    assert image[7, 7].tolist() == neutral
    place = (7 * 8 + 1 + 3) * 5 + 2
    blue, green, red, _ = image[place, 6 * (square + 10) + place].tolist()
    assert red == 255
    assert max(blue, green) < 140


def test_other_networks_have_no_such_picture(tmp_path: Path) -> None:
    config = models.configure("two_stream", num_classes=3, width=0.125, size=32)
    checkpoint.save(tmp_path / "c", models.build_from(config), checkpoint.Metadata(classes=("a", "b", "c")))
    assert first_filters(str(tmp_path / "c")) is None


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: "):
        report.main(str(tmp_path))
