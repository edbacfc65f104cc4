"""A raw video as the frames that a network was trained on: at their rate and size, as many as are wanted."""

from __future__ import annotations

import pytest
from test_decode import indices, write_video
from test_predict import build_small

from models.input_spec import FRAMES_PER_SECOND
from pipelines.clips.sampling import ClipSettings, decoding_of
from pipelines.datasets.records import FrameSampling
from pipelines.errors import InputError
from pipelines.evaluation.over_time import Reader
from pipelines.evaluation.raw_video import read_video
from pipelines.media.decode import DecodeSettings
from pipelines.training.trained_network import Network

INPUT_SPEC = build_small("rgb").input_spec


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four seconds at 15 frames a second."""
    return str(write_video(tmp_path_factory.mktemp("video") / "bars.mp4", frames=60, rate=15, crf="10"))


def trained_on(**sampling: object) -> Network:
    settings = ClipSettings().of_frames(FrameSampling(**{"fps": 25.0, "short_side": 74, **sampling}))  # type: ignore[arg-type]
    return Network(model=build_small("rgb"), settings=settings)


def test_decoding_follows_what_the_network_was_trained_on() -> None:
    for fps, frame_size in ((25.0, None), (12.0, None), ("native", "80x64")):
        settings = ClipSettings().of_frames(FrameSampling(fps=fps, short_side=96, frame_size=frame_size))  # type: ignore[arg-type]
        wanted = DecodeSettings(fps=fps, short_side=96, frame_size=frame_size)  # type: ignore[arg-type]
        # Through what a checkpoint says of them, too.
        assert (
            decoding_of(INPUT_SPEC, settings) == decoding_of(INPUT_SPEC, ClipSettings(**settings.to_json())) == wanted
        )  # type: ignore[arg-type]
    assert decoding_of(INPUT_SPEC, ClipSettings()).fps == FRAMES_PER_SECOND


def test_a_checkpoint_says_rate_and_size_only_where_they_are_unusual() -> None:
    usual = ClipSettings().of_frames(FrameSampling(fps=25.0, short_side=96))
    assert usual.to_json() == {"resize": "shorter", "flow_bound": 20.0, "short_side": 96}


@pytest.mark.parametrize(("fps", "most", "expected"), [(15.0, 20, 20), ("native", 20, 20), ("native", 100, 60)])
def test_the_first_frames_of_a_video(video: str, fps: float, most: int, expected: int) -> None:
    read = read_video(video, DecodeSettings(fps=fps, short_side=32, max_frames=1), most=lambda fps: most)
    assert indices(list(read.frames)) == list(range(expected))
    assert read.fps == pytest.approx(15, rel=1e-3)


def test_a_whole_video(video: str) -> None:
    assert len(read_video(video, DecodeSettings(fps="native", short_side=32)).frames) == 60
    assert len(read_video(video, DecodeSettings(short_side=32)).frames) == 100


@pytest.mark.parametrize("fps", [25.0, 15.0, "native"])
def test_clips_are_told_in_the_seconds_of_the_video(video: str, fps: float) -> None:
    rate = 15 if fps == "native" else fps
    reading = Reader({"rgb": trained_on(fps=fps)}, seconds=2).read(video)
    assert len(reading.frames) == 2 * rate
    assert (reading.seconds, reading.cut) == (pytest.approx(2, rel=1e-3), True)
    assert reading.clips[0].start == 0
    assert reading.clips[-1].end == pytest.approx((2 * rate - 1) / rate, rel=1e-3)
    assert reading.clips[0].end == pytest.approx(16 / rate, rel=1e-3)


def test_networks_of_other_frames_do_not_read_together() -> None:
    with pytest.raises(InputError, match="frames of different rates: 25 frames a second and frames at their videos'"):
        Reader({"rgb": trained_on(), "flow": trained_on(fps="native")}, seconds=2)
    with pytest.raises(InputError, match="frames of different sizes: 74 and 80x64 px"):
        Reader({"rgb": trained_on(), "flow": trained_on(frame_size="80x64")}, seconds=2)
