"""The page of a training: from a run's files alone, finished or not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

import models
from models import checkpoint
from pipelines.pages.training import draw_filters, first_filters


@pytest.mark.parametrize(("channels", "flow"), [(3, False), (2, True)])
def test_filters_lie_in_one_square_for_each_time_step(channels: int, flow: bool) -> None:
    filters = np.zeros((64, 7, 7, 7, channels), np.float32)
    filters[63, 6, 3, 3, 0] = 1  # red, or motion to the right: red on the wheel
    squares = [
        cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) for png in draw_filters(filters, flow=flow)
    ]
    scale = 6  # of a weight, in px
    assert [square.shape for square in squares] == [((8 * 8 + 1) * scale, (8 * 8 + 1) * scale, 4)] * 7
    assert squares[0][7, 7].tolist() == ([255, 255, 255, 255] if flow else [128, 128, 128, 255])
    assert squares[0][3, 3, 3] == 0  # the gap
    place = (7 * 8 + 1 + 3) * scale + 2
    blue, green, red, _ = squares[6][place, place].tolist()
    assert red == 255
    assert max(blue, green) < 140


def test_other_networks_have_no_such_picture(tmp_path: Path) -> None:
    config = models.configure("two_stream", num_classes=3, width=0.125, size=32)
    checkpoint.save(tmp_path / "c", models.build_from(config), checkpoint.Metadata(classes=("a", "b", "c")))
    assert first_filters(str(tmp_path / "c")) is None
