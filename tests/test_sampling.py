"""Clips from frames whose content says where each pixel and each frame came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import models
from models.input_spec import InputSpec
from pipelines import tvl1
from pipelines.clips.sampling import (
    PROTOCOLS,
    ClipSettings,
    EvaluationProtocol,
    centre_crop,
    decoded_side,
    flip_frames,
    flow_bound,
    resize_frames,
    settings_of,
)
from pipelines.clips.tensors import cut_test_clips, flow_clip, rgb_clip
from pipelines.errors import ConventionError
from pipelines.media.codec import CodecSettings

PAPER = ClipSettings()


def numbered(num_frames: int, *, height: int = 74, width: int = 100) -> dict[str, np.ndarray]:
    """Frame t is t everywhere: in every colour, and in u, with v its negative."""
    steps = np.arange(num_frames).reshape(-1, 1, 1, 1)
    rgb = np.broadcast_to(steps, (num_frames, height, width, 3)).astype(np.uint8)
    flow = np.broadcast_to(steps * [1.0, -1.0], (num_frames, height, width, 2))[:-1].astype(np.float32)
    return {"rgb": rgb, "flow": flow}


def input_spec_of(name: str, **settings: object) -> InputSpec:
    return models.build(name, num_classes=2, width=0.125, size=64, **settings).input_spec


def frames_of(clips: torch.Tensor) -> list[list[int]]:
    """The numbers of the frames that RGB clips (N, 3, T, H, W) of a `numbered` video are made of."""
    return torch.round((clips[:, 0, :, 0, 0] + 1) * 127.5).int().tolist()


@pytest.mark.parametrize(("height", "width", "top", "left"), [(10, 16, 1, 4), (11, 8, 1, 0), (9, 9, 0, 0)])
def test_the_crop_is_central(height: int, width: int, top: int, left: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    cropped = centre_crop(np.stack([rows, columns], axis=-1)[None], 8)
    assert cropped.shape == (1, 8, 8, 2)
    assert cropped[0, 0, 0].tolist() == [top, left]
    assert cropped[0, -1, -1].tolist() == [top + 7, left + 7]


def test_frames_smaller_than_the_crop_are_refused() -> None:
    with pytest.raises(ValueError, match="16×7 px, the crop is 8×8"):
        centre_crop(np.zeros((1, 7, 16, 3), np.uint8), 8)


def test_rgb_spreads_over_minus_one_to_one() -> None:
    frames = np.zeros((2, 4, 5, 3), np.uint8)
    frames[0, 1, 2], frames[1, 3, 4] = (255, 0, 51), (0, 127, 128)
    clip = rgb_clip(frames)
    assert (clip.shape, clip.dtype) == ((3, 2, 4, 5), torch.float32)
    torch.testing.assert_close(clip[:, 0, 1, 2], torch.tensor([1, -1, -0.6]))
    torch.testing.assert_close(clip[:, 1, 3, 4], torch.tensor([-1, -1 / 255, 1 / 255]))


def test_flow_is_clipped_at_the_bound_and_keeps_its_zero() -> None:
    flow = np.array([[0, 0], [20, -20], [10, -5], [25, -100]], np.float32).reshape(1, 1, 4, 2)
    assert flow_clip(flow)[:, 0, 0].tolist() == [[0, 1, 0.5, 1], [0, -1, -0.25, -1]]
    assert flow_clip(flow, 40)[:, 0, 0].tolist() == [[0, 0.5, 0.25, 0.625], [0, -0.5, -0.125, -1]]
    assert flow[0, 0, 3].tolist() == [25, -100]


def test_motion_to_the_right_is_a_positive_first_channel() -> None:
    rows, columns = np.mgrid[:64, :64]
    texture = 128 + 60 * np.sin(columns / 4) * np.cos(rows / 5)
    frames = np.stack([texture, np.roll(texture, 2, axis=1)]).astype(np.uint8)
    u, v = flow_clip(tvl1.flow(frames, backend="opencv"))[:, :, 16:48, 16:48].mean(dim=(1, 2, 3)) * 20
    assert u == pytest.approx(2, abs=0.3)
    assert v == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize(
    ("clip", "frames"),
    [(rgb_clip, np.zeros((2, 4, 4, 3), np.float32)), (rgb_clip, np.zeros((2, 4, 4, 2), np.uint8)),
     (flow_clip, np.zeros((2, 4, 4, 2), np.uint8)), (flow_clip, np.zeros((2, 4, 2), np.float32))],
)  # fmt: skip
def test_other_dtypes_and_shapes_are_refused(clip, frames) -> None:
    with pytest.raises(ValueError, match=r"shape \(T, H, W"):
        clip(frames)


def test_i3d_takes_the_first_frames_in_one_clip() -> None:
    input_spec = input_spec_of("i3d", frames=16, test_frames=24)
    clips = cut_test_clips(numbered(40), input_spec, PAPER)
    assert clips.keys() == {"rgb"}
    assert clips["rgb"].shape == (1, 3, 24, 64, 64)
    assert frames_of(clips["rgb"]) == [list(range(24))]


def test_i3d_takes_a_shorter_video_whole_down_to_the_length_of_a_training_clip() -> None:
    input_spec = input_spec_of("i3d", frames=16, test_frames=24)
    assert frames_of(cut_test_clips(numbered(20), input_spec, PAPER)["rgb"]) == [list(range(20))]
    assert frames_of(cut_test_clips(numbered(11), input_spec, PAPER)["rgb"]) == [[*range(11), *range(5)]]


def test_flow_loops_by_its_own_number_of_frames() -> None:
    input_spec = input_spec_of("i3d", stream="flow", frames=16, test_frames=24)
    clip = cut_test_clips(numbered(11), input_spec, ClipSettings(flow_bound=10))["flow"]
    expected = torch.tensor([t % 10 / 10 for t in range(16)])
    torch.testing.assert_close(clip[0, :, :, 3, 3], torch.stack([expected, -expected]))


def test_clips_follow_one_another_and_the_last_ones_loop() -> None:
    clips = cut_test_clips(numbered(40), input_spec_of("c3d", test_clips=3), PAPER)
    assert frames_of(clips["rgb"]) == [list(range(16)), list(range(16, 32)), [*range(32, 40), *range(8)]]


def test_steps_between_frames_are_kept() -> None:
    clips = cut_test_clips(numbered(40), input_spec_of("convnet_lstm", frames=4, test_frames=6, frame_step=5), PAPER)
    assert frames_of(clips["rgb"]) == [[0, 5, 10, 15, 20, 25]]


def test_snapshots_of_both_streams_fit_their_network() -> None:
    model = models.build("two_stream", num_classes=2, width=0.125, size=64, test_snapshots=3).eval()
    clips = cut_test_clips(numbered(40), model.input_spec, PAPER)
    assert frames_of(clips["rgb"]) == [[0], [10], [20]]
    assert clips["flow"].shape == (3, 2, 10, 64, 64)
    assert model(clips).shape == (3, 2)


def test_both_streams_of_a_looped_video_begin_anew_together() -> None:
    input_spec = input_spec_of("two_stream", test_snapshots=3)
    clips = cut_test_clips(numbered(16), input_spec, ClipSettings(flow_bound=100))
    assert frames_of(clips["rgb"]) == [[0], [10], [5]]  # frame 20 of a video whose 15 flow frames repeat
    firsts = (clips["flow"][:, 0, 0, 0, 0] * 100).round().int().tolist()
    assert firsts == [0, 10, 5]


def test_ten_clips_are_spread_from_the_first_frame_to_the_last() -> None:
    clips = cut_test_clips(numbered(43), input_spec_of("i3d", frames=16), PAPER, PROTOCOLS["10-clips"])
    assert [frames[0] for frames in frames_of(clips["rgb"])] == [3 * k for k in range(10)]
    assert frames_of(clips["rgb"])[-1] == list(range(27, 43))


def test_three_crops_lie_along_the_longer_side() -> None:
    columns = np.broadcast_to(np.arange(104, dtype=np.uint8)[:, None], (16, 74, 104, 3))
    rows = columns.transpose(0, 2, 1, 3)
    input_spec = input_spec_of("i3d", frames=16)
    for frames, axis in ((columns, -1), (rows, -2)):
        clips = cut_test_clips({"rgb": frames}, input_spec, PAPER, EvaluationProtocol(num_clips=1, num_crops=3))["rgb"]
        assert clips.shape == (3, 3, 16, 64, 64)
        firsts = (clips.select(axis, 0)[:, 0, 0, 20] + 1) * 127.5
        assert firsts.round().int().tolist() == [0, 20, 40]


def test_mirrored_clips_follow_their_plain_ones() -> None:
    video = {"flow": np.random.default_rng(0).normal(size=(16, 74, 74, 2)).astype(np.float32)}
    plain, mirrored = cut_test_clips(
        video, input_spec_of("i3d", stream="flow", frames=16), PAPER, EvaluationProtocol(num_clips=1, flip=True)
    )["flow"]
    torch.testing.assert_close(mirrored[0], -plain[0].flip(-1))
    torch.testing.assert_close(mirrored[1], plain[1].flip(-1))


def test_the_flow_of_mirrored_frames_is_the_mirrored_flow() -> None:
    """Not only by the formula: TV-L1 of the mirrored video agrees."""
    rows, columns = np.mgrid[:96, :96]
    texture = 128 + 60 * np.sin(columns / 4 + rows / 9) * np.cos(rows / 5)
    frames = np.stack([texture, np.roll(texture, (1, 2), axis=(0, 1))]).astype(np.uint8)
    computed = tvl1.flow(np.ascontiguousarray(frames[:, :, ::-1]), backend="opencv")
    np.testing.assert_allclose(
        flip_frames(tvl1.flow(frames, backend="opencv"))[:, 16:-16, 16:-16], computed[:, 16:-16, 16:-16], atol=0.2
    )


def test_vectors_are_scaled_with_their_frames() -> None:
    flow = np.full((1, 50, 200, 2), (4, 3), np.float32)
    resized = resize_frames(flow, (100, 100))
    assert resized.shape == (1, 100, 100, 2)
    np.testing.assert_allclose(resized[0, 50, 50], (2, 6))


def test_frames_are_squashed_or_keep_their_shape() -> None:
    input_spec = input_spec_of("i3d", frames=16)  # crops of 64 px from frames of 73
    frames = np.broadcast_to(np.arange(146, dtype=np.uint8)[:, None], (16, 146, 146, 3))[:, :, :]
    for resize in ("shorter", "square"):
        clip = cut_test_clips({"rgb": frames}, input_spec, ClipSettings(resize=resize))["rgb"]
        # A crop of 64 of 73 columns shows 128 of 146 levels.
        spread = (clip[0, 0, 0, 0, -1] - clip[0, 0, 0, 0, 0]) * 127.5
        assert spread == pytest.approx(126, abs=2)
    wide = np.broadcast_to(np.linspace(0, 255, 292).astype(np.uint8)[:, None], (16, 146, 292, 3))
    spreads = {}
    for resize in ("shorter", "square"):
        clip = cut_test_clips({"rgb": wide}, input_spec, ClipSettings(resize=resize))["rgb"]
        spreads[resize] = float((clip[0, 0, 0, 0, -1] - clip[0, 0, 0, 0, 0]) * 127.5)
    assert spreads["square"] == pytest.approx(2 * spreads["shorter"], rel=0.05)


def test_a_missing_stream_is_named() -> None:
    with pytest.raises(ValueError, match=r"also needs \['flow'\]"):
        cut_test_clips({"rgb": numbered(4)["rgb"]}, input_spec_of("i3d", stream="flow"), PAPER)


def test_a_video_without_flow_is_refused() -> None:
    with pytest.raises(ValueError, match="no frame to make a clip of"):
        cut_test_clips(numbered(1), input_spec_of("i3d", stream="flow"), PAPER)


def test_raw_videos_are_decoded_at_the_side_that_flow_was_computed_at() -> None:
    sides = {size: decoded_side(models.build("i3d", num_classes=2, width=0.125, size=size).input_spec, PAPER)
             for size in (224, 112, 64)}  # fmt: skip
    assert sides == {224: 256, 112: 128, 64: 74}
    assert decoded_side(input_spec_of("i3d"), ClipSettings(short_side=96)) == 96


def test_settings_come_from_the_checkpoint_else_from_the_convention() -> None:
    told = ClipSettings(resize="square", flow_bound=4, short_side=96)
    assert settings_of(told.to_json(), CodecSettings(bound=8).flow_convention()) == told
    assert settings_of({}, CodecSettings(bound=8).flow_convention()) == ClipSettings(flow_bound=8)
    assert settings_of({}, None) == ClipSettings(flow_bound=20)


def test_the_bound_comes_from_the_convention() -> None:
    assert flow_bound(None) == 20
    assert flow_bound(CodecSettings(bound=8).flow_convention()) == 8


@pytest.mark.parametrize(
    "change", [{"direction": "t+1_to_t"}, {"unit": "px_per_s"}, {"bound_px": 0}, {"bound_px": "20"}]
)
def test_unknown_flow_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConventionError, match=next(iter(change))):
        flow_bound({**CodecSettings().flow_convention(), **change})
