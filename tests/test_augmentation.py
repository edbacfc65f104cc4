"""Training clips of videos whose pixels say where they came from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

import models
from models.input_spec import InputSpec
from pipelines.clips.augmentation import Augmentation, cut_training_clip, empty_clip, jitter_colours
from pipelines.clips.sampling import ClipSettings

HEIGHT, WIDTH = 74, 100


def input_spec_of(name: str, **settings: object) -> InputSpec:
    return models.input_spec_of(models.configure(name, num_classes=2, width=0.125, size=64, **settings))


I3D = input_spec_of("i3d", frames=16)
BOTH = input_spec_of("two_stream")


def reader(num_frames: int, asked: list[tuple[str, int, int]] | None = None) -> Callable[..., npt.NDArray]:
    """RGB is (frame, row, column); u of the flow is the column, v the frame."""
    t, y, x = np.mgrid[:num_frames, :HEIGHT, :WIDTH]
    rgb = np.stack([t, y, x], axis=-1).astype(np.uint8)
    flow = np.stack([x, t], axis=-1).astype(np.float32)[:-1]

    def read(stream: str, start: int, stop: int) -> npt.NDArray:
        if asked is not None:
            asked.append((stream, start, stop))
        return {"rgb": rgb, "flow": flow}[stream][start:stop]

    return read


def cut(input_spec: InputSpec, num_frames: int, seed: int, **changes: object) -> dict[str, npt.NDArray]:
    augmentation = Augmentation(**{"flip": 0.0, **changes})
    rng = np.random.default_rng(seed)
    return cut_training_clip(reader(num_frames), num_frames, input_spec, ClipSettings(), augmentation, rng)


def test_a_clip_is_consecutive_frames_of_the_contract() -> None:
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


def test_only_the_window_is_read() -> None:
    asked: list[tuple[str, int, int]] = []
    settings, rng = ClipSettings(), np.random.default_rng(1)
    cut_training_clip(reader(60, asked), 60, BOTH, settings, Augmentation(), rng)
    assert sorted(stream for stream, _, _ in asked) == ["flow", "rgb"]
    assert {stop - start for _, start, stop in asked} == {10}


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
    with pytest.raises(ValueError, match="video of 1 frames gives no clip"):
        cut(BOTH, 1, seed=0)
    with pytest.raises(ValueError, match="of 16 rgb frames from frame"):
        cut_training_clip(reader(5), 40, I3D, ClipSettings(), Augmentation(), np.random.default_rng(0))


def test_empty_clips_have_the_same_shapes() -> None:
    for input_spec in (I3D, BOTH, input_spec_of("convnet_lstm")):
        found = cut(input_spec, 200, seed=0)
        for stream, clip in empty_clip(input_spec).items():
            assert (clip.shape, clip.dtype) == (found[stream].shape, found[stream].dtype)
