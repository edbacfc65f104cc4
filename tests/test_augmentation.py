"""Training clips of videos whose pixels say where they came from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

import models
from models.input_spec import InputSpec
from pipelines.clips.augmentation import Augmentation, cut_training_clip, empty_clip, jitter_colours
from pipelines.clips.sampling import ClipSettings, flip_frames
from pipelines.media.codec import Area, FlowScale, dequantise, negate, quantise

HEIGHT, WIDTH = 74, 100


def input_spec_of(name: str, **settings: object) -> InputSpec:
    return models.input_spec_of(models.configure(name, num_classes=2, width=0.125, size=64, **settings))


I3D = input_spec_of("i3d", frames=16)
BOTH = input_spec_of("two_stream")
FLOW = input_spec_of("i3d", stream="flow", frames=10)


def cut_area(frames: npt.NDArray, area: Area | None) -> npt.NDArray:
    rows, columns = area.slices if area else (slice(None), slice(None))
    return frames[:, rows, columns]


@cache
def video(num_frames: int) -> dict[str, npt.NDArray]:
    """RGB is (frame, row, column); u of the flow is the column, v the frame."""
    t, y, x = np.mgrid[:num_frames, :HEIGHT, :WIDTH]
    flow = np.stack([x, t], axis=-1).astype(np.float32)[:-1]
    return {"rgb": np.stack([t, y, x], axis=-1).astype(np.uint8), "flow": flow}


def reader(num_frames: int, asked: list[tuple[str, list[int]]] | None = None) -> Callable[..., npt.NDArray]:
    """Gives frames and areas of `video`."""

    def read(stream: str, frames: list[int], area: Area | None, *, mirrored: bool) -> npt.NDArray:
        if asked is not None:
            asked.append((stream, frames))
        found = cut_area(video(num_frames)[stream][frames], area)
        return flip_frames(found) if mirrored else found

    return read


def cut(input_spec: InputSpec, num_frames: int, seed: int, **changes: object) -> dict[str, npt.NDArray]:
    augmentation = Augmentation(**{"flip": 0.0, **changes})
    rng = np.random.default_rng(seed)
    return cut_training_clip(
        reader(num_frames), (num_frames, HEIGHT, WIDTH), input_spec, ClipSettings(), augmentation, rng
    )


def test_a_clip_is_consecutive_frames_of_the_input_spec() -> None:
    clip = cut(I3D, 40, seed=0)["rgb"]
    assert (clip.shape, clip.dtype) == ((16, 64, 64, 3), np.uint8)
    assert np.diff(clip[:, 0, 0, 0].astype(int)).tolist() == [1] * 15
    assert (np.diff(clip[0, :, 0, 1].astype(int)) == 1).all()
    assert (np.diff(clip[0, 0, :, 2].astype(int)) == 1).all()


def test_first_frames_and_corners_take_every_place_and_no_other() -> None:
    clips = [cut(I3D, 20, seed)["rgb"] for seed in range(400)]
    assert {int(clip[0, 0, 0, 0]) for clip in clips} == set(range(5))
    assert {int(clip[0, 0, 0, 1]) for clip in clips} == set(range(HEIGHT - 64 + 1))
    assert {int(clip[0, 0, 0, 2]) for clip in clips} == set(range(WIDTH - 64 + 1))


def test_a_short_video_is_looped_from_its_first_frame() -> None:
    clip = cut(I3D, 7, seed=3)["rgb"]
    assert clip[:, 0, 0, 0].tolist() == [t % 7 for t in range(16)]


def test_only_the_frames_that_a_clip_shows_are_read() -> None:
    asked: list[tuple[str, list[int]]] = []
    settings, rng = ClipSettings(), np.random.default_rng(1)
    cut_training_clip(reader(60, asked), (60, HEIGHT, WIDTH), BOTH, settings, Augmentation(), rng)
    assert [(stream, len(frames)) for stream, frames in sorted(asked)] == [("flow", 10), ("rgb", 1)]


def test_streams_show_the_same_frames_and_pixels() -> None:
    for seed in range(20):
        clip = cut(BOTH, 60, seed)
        assert clip["flow"][0, 0, 0].tolist() == [clip["rgb"][0, 0, 0, 2], clip["rgb"][0, 0, 0, 0]]


def test_flow_has_one_frame_fewer_and_the_last_start_fits_it() -> None:
    starts = {int(cut(BOTH, 12, seed)["rgb"][0, 0, 0, 0]) for seed in range(100)}
    assert starts == {0, 1}


def test_a_mirrored_clip_is_mirrored_in_all_frames_and_negates_u() -> None:
    plain, mirrored = cut(BOTH, 60, 5), cut(BOTH, 60, 5, flip=1.0)
    np.testing.assert_array_equal(mirrored["rgb"], plain["rgb"][:, :, ::-1])
    np.testing.assert_array_equal(mirrored["flow"][..., 0], -plain["flow"][:, :, ::-1, 0])
    np.testing.assert_array_equal(mirrored["flow"][..., 1], plain["flow"][:, :, ::-1, 1])


def test_clips_are_mirrored_as_often_as_asked() -> None:
    mirrored = [cut(I3D, 20, seed, flip=0.25)["rgb"][0, 0, 0, 2] > 36 for seed in range(400)]
    assert 70 < sum(mirrored) < 130


def test_the_same_seed_gives_the_same_clip() -> None:
    np.testing.assert_array_equal(cut(I3D, 40, 7, jitter=0.5)["rgb"], cut(I3D, 40, 7, jitter=0.5)["rgb"])
    assert (cut(I3D, 40, 7)["rgb"] != cut(I3D, 40, 8)["rgb"]).any()


def test_jitter_is_the_same_for_all_frames_and_leaves_flow_alone() -> None:
    frames = np.broadcast_to(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), (5, 8, 8, 3)).astype(np.uint8)
    changed = jitter_colours(frames, 1.2, 0.8, 0.5)
    assert (changed == changed[0]).all()
    assert (changed != frames).any()
    np.testing.assert_array_equal(jitter_colours(frames, 1, 1, 1), frames)
    np.testing.assert_array_equal(cut(BOTH, 60, 5)["flow"], cut(BOTH, 60, 5, jitter=0.9)["flow"])


def test_gains_do_what_their_names_say() -> None:
    frames = np.array([[60, 60, 60], [120, 120, 120], [100, 20, 20]], np.uint8).reshape(1, 1, 3, 3)
    assert jitter_colours(frames, 1.5, 1, 1)[0, 0, 0].tolist() == [90, 90, 90]
    grey = jitter_colours(frames, 1, 1, 0)[0, 0, 2]
    assert grey[0] == grey[1] == grey[2]
    assert np.ptp(jitter_colours(frames, 1, 0, 0)) == 0


@pytest.mark.parametrize("change", [{"flip": 1.5}, {"flip": -0.1}, {"jitter": 1.0}])
def test_impossible_augmentation_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(change))}"):
        Augmentation(**change)


def test_videos_without_a_clip_are_refused() -> None:
    with pytest.raises(ValueError, match="video of 1 frame gives no clip"):
        cut(BOTH, 1, seed=0)


def test_empty_clips_have_the_same_shapes() -> None:
    for input_spec in (I3D, BOTH, input_spec_of("convnet_lstm")):
        found = cut(input_spec, 200, seed=0)
        for stream, clip in empty_clip(input_spec).items():
            assert (clip.shape, clip.dtype) == (found[stream].shape, found[stream].dtype)


TEN_BITS = FlowScale(bound=20, levels=1023, zero_code=512)


@pytest.mark.parametrize("scale", [TEN_BITS, FlowScale(bound=20, levels=256, zero_code=127.5)])
def test_flow_in_codes_is_the_flow_in_pixels(scale: FlowScale) -> None:
    flow = np.random.default_rng(0).uniform(-30, 30, (12, HEIGHT, WIDTH, 2))
    codes = quantise(flow, scale)

    def read(_: str, frames: list[int], area: Area | None, *, mirrored: bool) -> npt.NDArray:
        found = cut_area(codes[frames], area)
        return np.stack([negate(found[:, :, ::-1, 0], scale), found[:, :, ::-1, 1]], -1) if mirrored else found

    def read_pixels(*given: object, **flags: bool) -> npt.NDArray:
        return dequantise(read(*given, **flags), scale)

    for flip in (0.0, 1.0):
        given = (12, HEIGHT, WIDTH), FLOW, ClipSettings(), Augmentation(flip=flip)
        coded = cut_training_clip(read, *given, np.random.default_rng(4), scale=scale)["flow"]
        pixels = cut_training_clip(read_pixels, *given, np.random.default_rng(4))
        assert coded.dtype == scale.dtype
        np.testing.assert_allclose(dequantise(coded, scale), pixels["flow"], atol=0.01)  # float16 at 20 px
    assert empty_clip(FLOW, scale)["flow"].dtype == scale.dtype


def test_frames_of_another_size_are_resized_in_pixels() -> None:
    """A video that is not of its data set's size: the clip holds codes all the same."""
    flow = np.full((12, 2 * HEIGHT, 2 * WIDTH, 2), 8.0)

    def read(_: str, frames: list[int], area: Area | None, *, mirrored: bool) -> npt.NDArray:
        assert area is None
        assert not mirrored
        return quantise(flow[frames], TEN_BITS)

    given = (12, 2 * HEIGHT, 2 * WIDTH), FLOW, ClipSettings(), Augmentation(), np.random.default_rng(0)
    clip = dequantise(cut_training_clip(read, *given, scale=TEN_BITS)["flow"], TEN_BITS)
    assert clip.shape[1:3] == (64, 64)
    assert np.abs(clip).mean() == pytest.approx(8 * 73 / (2 * HEIGHT), abs=0.05)
