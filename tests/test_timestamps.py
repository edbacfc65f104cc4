"""What places frames in time. How whole videos come out is seen in test_decode.py and test_odd_videos.py."""

from __future__ import annotations

from fractions import Fraction

from pipelines.media.timestamps import Stamps


def judge(pts: list[int | None], container: str = "mov", dts: list[int | None] | None = None) -> str:
    dts = sorted(t for t in pts if t is not None) if dts is None else dts  # type: ignore[assignment]
    return Stamps(pts, dts, container, Fraction(1, 1000), Fraction(25)).judge()


def test_judge() -> None:
    assert judge([0, 120, 40, 80, 160]) == "time"  # B-frames: file order is decoding order
    assert judge([0, 33, 4033]) == "time"
    assert judge([7]) == "time"
    assert judge([0, 40, 80], container="avi") == "order"
    assert judge([0, None, 80]) == "order"
    assert judge([None, None]) == "order"
    assert judge([0, 40, 40, 80, 80]) == "time"  # the later of two is shown
    assert judge([0, 0, 0, 0, 40]) == "order"
    assert judge([]) == "order"


def test_a_pause_is_a_pause_if_decode_times_and_file_agree() -> None:
    before, after = list(range(0, 2000, 40)), list(range(90_000, 92_000, 40))
    assert judge([*before, *after]) == "time"
    assert judge([*before[:-1], after[0], before[-1], *after[1:]]) == "time"  # a B-frame across the pause
    assert judge([*after, *before]) == "order"
    assert judge([*before[:9], 95_443_717, *before[9:]], dts=list(range(51))) == "order"  # one wrong stamp
    assert judge([*before, *after], dts=[*before, *before]) == "order"  # decode times fall
