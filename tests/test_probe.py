"""What places frames in time. What else is told from packets is seen in whole videos: test_decode.py."""

from __future__ import annotations

from fractions import Fraction

from pipelines.media.probe import judge_timing


def judge(pts: list[int | None], container: str = "mov") -> str:
    return judge_timing(pts, container=container, time_base=Fraction(1, 1000), rate=Fraction(25))


def test_judge_timing() -> None:
    assert judge([0, 120, 40, 80, 160]) == "time"  # B-frames: file order is decoding order
    assert judge([0, 33, 4033]) == "time"
    assert judge([7]) == "time"
    assert judge([0, 40, 80], container="avi") == "order"
    assert judge([0, None, 80]) == "order"
    assert judge([None, None]) == "order"
    assert judge([0, 40, 40, 80]) == "order"
    assert judge([0, 40, 95_443_717]) == "order"  # a wrapped 33-bit clock
    assert judge([]) == "order"
