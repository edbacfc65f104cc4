"""Round trips, conventions, windows and bytes of the flow and RGB codecs, on real encoders and decoders."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import get_args

import av
import cv2
import numpy as np
import pytest

from pipelines.errors import ConventionError, SettingsError
from pipelines.media import codec as codec_module
from pipelines.media.codec import (
    CodecSettings,
    FlowCodec,
    FlowEncoder,
    FlowScale,
    RGBCodec,
    RGBEncoder,
    check_convention,
    decode_code_frames,
    decode_codes,
    decode_flow,
    decode_rgb,
    decode_rgb_frames,
    dequantise,
    flow_error,
    negate,
    quantise,
    scale_of,
    split_components,
    stack_components,
)
from pipelines.media.mp4 import Area, find_keyframes, read_frames

FLOW_CODECS = get_args(FlowCodec)
RGB_CODECS = get_args(RGBCodec)
DEFAULT = CodecSettings()


def make_flow(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A still background and a disc that moves to the right and down at (6.3, -2.2) px a frame."""
    y, x = np.mgrid[:height, :width]
    discs = [np.hypot(x - 10 - 2 * t % width, y - 12 - t % height) < 9 for t in range(num_frames)]
    flow = np.zeros((num_frames, height, width, 2), np.float32)
    for field, disc in zip(flow, discs, strict=True):
        field[disc] = (6.3, -2.2)
    return flow


def encode_flow(flow: np.ndarray, settings: CodecSettings = DEFAULT) -> bytes:
    encoder = FlowEncoder(settings, height=flow.shape[1], width=flow.shape[2])
    for field in flow:
        encoder.write(field)
    return encoder.close()


def encode_rgb(frames: np.ndarray, settings: CodecSettings = DEFAULT, fps: float = 25.0) -> bytes:
    encoder = RGBEncoder(settings, height=frames.shape[1], width=frames.shape[2], fps=fps)
    for frame in frames:
        encoder.write(frame)
    return encoder.close()


@pytest.mark.parametrize("name", FLOW_CODECS)
def test_quantised_flow_is_within_half_a_step_and_clipped(name: FlowCodec) -> None:
    scale = CodecSettings(flow_codec=name, bound=15).flow_scale
    flow = np.linspace(-30, 30, 6001).reshape(-1, 1, 1)
    restored = dequantise(quantise(flow, scale), scale)
    assert np.abs(restored - np.clip(flow, -15, 15)).max() <= scale.step / 2 + 1e-5
    assert (restored.min(), restored.max()) == (-15, 15)


def test_zero_flow_has_its_own_code_except_in_denseflows_convention() -> None:
    zero = np.zeros((1, 1, 2), np.float32)
    codes = {name: quantise(zero, CodecSettings(flow_codec=name).flow_scale).flat[0] for name in FLOW_CODECS}
    assert codes == {"h264": 512, "lossless": 128, "jpeg": 128}
    back = {name: dequantise(np.array(code), CodecSettings(flow_codec=name).flow_scale) for name, code in codes.items()}
    assert back["h264"] == back["lossless"] == 0
    assert back["jpeg"] == pytest.approx(20 / 255)


def test_jpeg_codes_are_those_of_denseflow() -> None:
    flow = np.random.default_rng(0).uniform(-25, 25, (20, 30, 2)).astype(np.float32)
    theirs = [0 if v < -20 else 255 if v > 20 else round(255 * (v + 20) / 40) for v in flow.ravel().astype(float)]
    ours = quantise(flow, CodecSettings(flow_codec="jpeg").flow_scale)
    assert ours.ravel().tolist() == theirs


def test_flow_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quantise(np.array([[[0.0, np.nan]]]), DEFAULT.flow_scale)


def test_components_are_stacked_u_over_v() -> None:
    levels = np.arange(2 * 4 * 6 * 2, dtype=np.uint16).reshape(2, 4, 6, 2)
    image = stack_components(levels)
    assert image.shape == (2, 8, 6)
    assert np.array_equal(image[:, :4], levels[..., 0])
    assert np.array_equal(split_components(image), levels)


@pytest.mark.parametrize(("name", "worst_mean"), [("h264", 0.05), ("lossless", 0.08), ("jpeg", 0.12)])
def test_flow_comes_back_in_pixels(name: FlowCodec, worst_mean: float) -> None:
    settings, flow = CodecSettings(flow_codec=name), make_flow(12)
    decoded = decode_flow(encode_flow(flow, settings), settings.flow_convention())
    assert decoded.dtype == np.float32
    assert flow_error(flow, decoded, settings.bound).mean < worst_mean
    assert flow_error(np.roll(flow, 1, axis=-1), decoded, settings.bound).mean > 2 * worst_mean


def test_lossless_keeps_every_code() -> None:
    settings = CodecSettings(flow_codec="lossless")
    flow = np.random.default_rng(1).uniform(-22, 22, (9, 32, 40, 2)).astype(np.float32)
    decoded = decode_codes(encode_flow(flow, settings), settings.flow_convention())
    assert np.array_equal(decoded, quantise(flow, settings.flow_scale))


@pytest.mark.parametrize("name", FLOW_CODECS)
def test_windows_equal_the_slices_of_a_whole_decode(name: FlowCodec) -> None:
    settings = CodecSettings(flow_codec=name, keyframe_interval=8)
    data, convention = encode_flow(make_flow(40), settings), settings.flow_convention()
    whole = decode_codes(data, convention)
    assert len(whole) == 40
    for start in range(44):
        window = decode_codes(data, convention, start=start, stop=start + 7)
        assert np.array_equal(window, whole[start : start + 7].reshape(len(window), *window.shape[1:])), start


@pytest.mark.parametrize("name", RGB_CODECS)
@pytest.mark.parametrize("fps", [25, 30000 / 1001, 0.5])
def test_rgb_windows_equal_the_slices_of_a_whole_decode(name: RGBCodec, fps: float) -> None:
    frames = np.random.default_rng(2).integers(0, 255, (30, 16, 24, 3), np.uint8)
    data = encode_rgb(frames, CodecSettings(rgb_codec=name, keyframe_interval=8), fps=fps)
    whole = decode_rgb(data)
    assert whole.shape == frames.shape
    for start in range(30):
        assert np.array_equal(decode_rgb(data, start=start, stop=start + 5), whole[start : start + 5]), start


@pytest.mark.parametrize("name", FLOW_CODECS)
def test_negated_codes_are_those_of_the_opposite_flow(name: FlowCodec) -> None:
    scale = CodecSettings(flow_codec=name).flow_scale
    codes = quantise(np.linspace(-20, 20, 999, dtype=np.float32), scale)
    assert negate(codes, scale).dtype == codes.dtype
    np.testing.assert_allclose(dequantise(negate(codes, scale), scale), -dequantise(codes, scale), atol=1e-4)


AREAS = [None, Area(top=0, left=0, height=32, width=48), Area(top=7, left=5, height=20, width=31)]


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("frames", [[3], [0, 1, 2], [16, 20, 39]])
def test_chosen_frames_and_areas_are_those_of_the_whole_video(frames: list[int], area: Area | None) -> None:
    rows, columns = area.slices if area else (slice(None), slice(None))
    rgb = encode_rgb(np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8))
    expected = decode_rgb(rgb)[frames][:, rows, columns]
    assert np.array_equal(decode_rgb_frames(rgb, frames, area), expected)
    assert np.array_equal(decode_rgb_frames(rgb, frames, area, mirrored=True), expected[:, :, ::-1])
    for name in FLOW_CODECS:
        settings = CodecSettings(flow_codec=name)
        data, convention = encode_flow(make_flow(40, 32, 48), settings), settings.flow_convention()
        whole = decode_codes(data, convention)
        expected = whole[frames][:, rows, columns]
        assert np.array_equal(decode_code_frames(data, convention, frames, area), expected)
        u = negate(expected[:, :, ::-1, 0], settings.flow_scale)
        mirrored = decode_code_frames(data, convention, frames, area, mirrored=True)
        assert np.array_equal(mirrored, np.stack([u, expected[:, :, ::-1, 1]], -1))
    with pytest.raises(ValueError, match="1 of 2 frames from frame 39 on could be decoded"):
        decode_rgb_frames(rgb, [39, 40], area)


@pytest.mark.parametrize("name", ["h264", "lossless"])
@pytest.mark.parametrize("interval", [1, 8, 16])
def test_a_window_decodes_at_most_one_keyframe_interval_in_vain(name: FlowCodec, interval: int) -> None:
    data = encode_flow(make_flow(50), CodecSettings(flow_codec=name, keyframe_interval=interval))
    keyframes = find_keyframes(data)
    assert keyframes == list(range(0, 50, interval))
    for start in range(50):
        first, _ = next(read_frames(data, start=start))
        assert first == start // interval * interval


@pytest.mark.parametrize("name", RGB_CODECS)
def test_rgb_keyframes_are_no_further_apart_than_asked(name: RGBCodec) -> None:
    frames = np.random.default_rng(3).integers(0, 255, (40, 16, 24, 3), np.uint8)
    keyframes = find_keyframes(encode_rgb(frames, CodecSettings(rgb_codec=name, keyframe_interval=8)))
    assert max(np.diff([*keyframes, 40])) <= 8


@pytest.mark.parametrize("name", RGB_CODECS)
def test_rgb_keeps_colours(name: RGBCodec) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
    frame = np.repeat(np.repeat(colours[None], 32, 0), 16, 1)
    data = encode_rgb(np.stack([frame] * 5), CodecSettings(rgb_codec=name))
    centres = decode_rgb(data)[2, 16, 8::16].astype(int)
    assert np.abs(centres - colours).max() <= 6
    with av.open(io.BytesIO(data)) as container:  # a player without our code finds the same colours
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24")[16, 8::16].astype(int)
    assert np.abs(shown - colours).max() <= 8


@pytest.mark.parametrize("name", FLOW_CODECS)
@pytest.mark.parametrize("size", [(2, 2), (2, 256), (16, 256), (256, 16), (46, 62)])
def test_any_even_size_is_stored(name: FlowCodec, size: tuple[int, int]) -> None:
    settings, flow = CodecSettings(flow_codec=name), np.full((3, *size, 2), 1.5, np.float32)
    decoded = decode_flow(encode_flow(flow, settings), settings.flow_convention())
    assert decoded.shape == flow.shape
    assert np.abs(decoded - flow).max() < 0.12


@pytest.mark.parametrize("name", RGB_CODECS)
@pytest.mark.parametrize("size", [(2, 2), (2, 64), (16, 256), (256, 16)])
def test_any_even_size_of_rgb_is_stored(name: RGBCodec, size: tuple[int, int]) -> None:
    frames = np.full((3, *size, 3), 90, np.uint8)
    decoded = decode_rgb(encode_rgb(frames, CodecSettings(rgb_codec=name)))
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - 90).max() <= 3


@pytest.mark.parametrize("encoder", [FlowEncoder, RGBEncoder])
@pytest.mark.parametrize("size", [(3, 4), (4, 5), (0, 2)])
def test_odd_sizes_are_refused(encoder: type[FlowEncoder] | type[RGBEncoder], size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="even"):
        encoder(DEFAULT, height=size[0], width=size[1])


@pytest.mark.parametrize("name", FLOW_CODECS)
def test_no_flow_is_no_bytes(name: FlowCodec) -> None:
    settings = CodecSettings(flow_codec=name)
    encoder = FlowEncoder(settings, height=4, width=6)
    assert encoder.close() == b""
    assert (encoder.num_frames, encoder.mean_magnitude, encoder.clipped_share) == (0, 0, 0)
    assert decode_flow(b"", settings.flow_convention(), size=(4, 6)).shape == (0, 4, 6, 2)
    assert decode_rgb(b"", size=(4, 6)).shape == (0, 4, 6, 3)


@pytest.mark.parametrize("window", [(-1, 2), (5, 3)])
def test_windows_that_run_backwards_are_refused(window: tuple[int, int]) -> None:
    data = encode_flow(make_flow(2))
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        decode_flow(data, DEFAULT.flow_convention(), start=window[0], stop=window[1])
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        decode_rgb(data, start=window[0], stop=window[1])


def test_what_was_written_is_counted() -> None:
    flow = np.zeros((2, 4, 6, 2), np.float32)
    flow[0, ..., 0], flow[0, ..., 1] = 3, 4
    flow[1, :2, :, 0] = -40
    encoder = FlowEncoder(DEFAULT, height=4, width=6)
    for field in flow:
        encoder.write(field)
    assert encoder.num_frames == 2
    assert encoder.mean_magnitude == pytest.approx((5 + 10) / 2, abs=0.02)
    assert encoder.clipped_share == 1 / 8


def test_written_levels_and_written_flow_give_the_same_bytes() -> None:
    flow = make_flow(5)
    encoder = FlowEncoder(DEFAULT, height=48, width=64)
    for image in stack_components(quantise(flow, DEFAULT.flow_scale)):
        encoder.write_levels(image)
    assert encoder.close() == encode_flow(flow)


def test_a_mirrored_view_is_a_frame_like_any_other() -> None:
    frames = np.random.default_rng(5).integers(0, 255, (2, 16, 24, 3), np.uint8)
    flow = make_flow(2)
    assert encode_rgb(frames[:, :, ::-1]) == encode_rgb(frames[:, :, ::-1].copy())
    assert encode_flow(flow[:, :, ::-1]) == encode_flow(flow[:, :, ::-1].copy())


def test_levels_of_another_shape_or_depth_are_refused() -> None:
    encoder = FlowEncoder(DEFAULT, height=4, width=6)
    with pytest.raises(ValueError, match="uint16"):
        encoder.write_levels(np.zeros((8, 6), np.uint8))
    with pytest.raises(ValueError, match=r"\(8, 6\)"):
        encoder.write_levels(np.zeros((4, 6), np.uint16))
    with pytest.raises(ValueError, match="uint8"):
        RGBEncoder(DEFAULT, height=4, width=6).write(np.zeros((4, 6, 3), np.float32))


@pytest.mark.parametrize("name", FLOW_CODECS)
def test_a_convention_says_how_to_read_its_codes(name: FlowCodec) -> None:
    settings = CodecSettings(flow_codec=name, bound=12)
    convention = settings.flow_convention()
    check_convention(convention, settings.flow_convention())
    assert scale_of(convention) == settings.flow_scale
    assert isinstance(scale_of(convention), FlowScale)


def test_another_bound_than_expected_is_refused_with_both_named() -> None:
    found, expected = CodecSettings(bound=15).flow_convention(), DEFAULT.flow_convention()
    with pytest.raises(ConventionError, match=r"15\.0.*20\.0"):
        check_convention(found, expected)
    check_convention(found, {"levels": 1023})


@pytest.mark.parametrize(
    "change", [{"zero_code": 127.5}, {"codec": "vvc"}, {"bound_px": "wide"}, {"unit": "m/s"}, {"x": 1}]
)
def test_unknown_conventions_are_refused(change: dict[str, str | int | float]) -> None:
    data, convention = encode_flow(make_flow(1)), {**DEFAULT.flow_convention(), **change}
    with pytest.raises(ConventionError, match=str(next(iter(change.values())))):
        decode_flow(data, convention)
    with pytest.raises(ConventionError):
        check_convention({})


def test_codes_of_another_depth_than_the_convention_says_are_refused() -> None:
    data = encode_flow(make_flow(2), CodecSettings(flow_codec="lossless"))
    with pytest.raises(ConventionError, match=r"uint8.*uint16"):
        decode_flow(data, DEFAULT.flow_convention())


@pytest.mark.parametrize(
    "change",
    [
        {"flow_codec": "divx"},
        {"rgb_codec": "jpeg"},
        {"bound": 0},
        {"bound": float("nan")},
        {"keyframe_interval": 0},
        {"keyframe_interval": 10**12},
        {"flow_quality": 52},
        {"rgb_quality": -1},
        {"flow_codec": "lossless", "flow_quality": 3},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, object]) -> None:
    name = {"flow_codec": "codec"}.get(name := next(reversed(change)), name)
    with pytest.raises(SettingsError, match=f"^--{name.replace('_', '-')} is "):
        replace(DEFAULT, **change)  # type: ignore[arg-type]


def test_the_quality_in_force_is_named() -> None:
    given = CodecSettings(flow_quality=3, rgb_quality=0)
    assert (given.resolved_flow_quality, given.resolved_rgb_quality) == (3, 0)
    frame, flow = np.random.default_rng(6).integers(0, 255, (2, 16, 24, 3), np.uint8), make_flow(2)
    spelled = CodecSettings(flow_quality=DEFAULT.resolved_flow_quality, rgb_quality=DEFAULT.resolved_rgb_quality)
    assert encode_flow(flow, spelled) == encode_flow(flow)
    assert encode_rgb(frame, spelled) == encode_rgb(frame)


def test_quality_changes_the_bytes() -> None:
    flow = make_flow(8)
    for name in ("h264", "jpeg"):
        fine, coarse = (5, 40) if name != "jpeg" else (98, 60)
        sizes = [len(encode_flow(flow, CodecSettings(flow_codec=name, flow_quality=q))) for q in (fine, coarse)]
        assert sizes[0] > sizes[1], name


def test_jpeg_pairs_open_with_zip_and_opencv_alone() -> None:
    flow = make_flow(3)
    data = encode_flow(flow, CodecSettings(flow_codec="jpeg"))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist()[:2] == ["flow_x_00000.jpg", "flow_y_00000.jpg"]
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        jpeg = archive.read("flow_y_00002.jpg")
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    assert image.shape == (48, 64)
    assert image.min() == pytest.approx((-2.2 + 20) * 255 / 40, abs=6)


def make_waves(num_frames: int) -> np.ndarray:
    """RGB frames of moving waves, sides no multiple of 16: with B-frames x264 writes them in several ways."""
    y, x = np.mgrid[:112, :150]
    t = np.arange(num_frames)[:, None, None]
    grey = 127 + 60 * np.sin((x + 3 * t) / 9) + 60 * np.sin((y * x / 150 - 2 * t) / 7)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("settings", [CodecSettings(rgb_codec=name) for name in RGB_CODECS], ids=RGB_CODECS)
def test_what_lies_in_memory_does_not_change_the_bytes_of_rgb(settings: CodecSettings) -> None:
    frames, kept, blobs = make_waves(40), [], set()
    for repeat in range(6):
        kept.append(bytes(3000 * (repeat + 1) ** 3))
        blobs.add(encode_rgb(frames, settings))
    assert len(blobs) == 1


@pytest.mark.parametrize("name", FLOW_CODECS)
def test_what_lies_in_memory_does_not_change_the_bytes_of_flow(name: FlowCodec) -> None:
    flow, kept, blobs = make_waves(40)[..., :2] / np.float32(8) - 16, [], set()
    for repeat in range(6):
        kept.append(bytes(3000 * (repeat + 1) ** 3))
        blobs.add(encode_flow(flow, CodecSettings(flow_codec=name)))
    assert len(blobs) == 1


ENCODE_ALL = """
import hashlib, sys
import numpy as np
from tests.test_codec import FLOW_CODECS, RGB_CODECS, CodecSettings, encode_flow, encode_rgb, make_flow
frames = np.random.default_rng(4).integers(0, 255, (20, 32, 48, 3), np.uint8)
blobs = [encode_flow(make_flow(40), CodecSettings(flow_codec=name)) for name in FLOW_CODECS]
blobs += [encode_rgb(frames, CodecSettings(rgb_codec=name)) for name in RGB_CODECS]
print(hashlib.sha256(b"".join(blobs)).hexdigest())
"""


def test_two_processes_write_the_same_bytes_and_print_nothing() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", ENCODE_ALL],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == hashlib.sha256().digest_size * 2
    assert runs[0].stderr == ""


def test_flow_error_is_that_of_clipped_flow() -> None:
    flow = np.zeros((1, 10, 50, 2), np.float32)
    flow[0, 0, 0] = 100
    decoded = np.zeros_like(flow)
    decoded[0, 0, 0] = (20, 17)
    error = flow_error(flow, decoded, 20)
    assert error.max == 3
    assert error.mean == pytest.approx(3 / 1000)
    assert error.rms == pytest.approx(3 / np.sqrt(1000))
    with pytest.raises(ValueError, match="shape"):
        flow_error(flow, decoded[:0], 20)


def test_default_beats_jpeg_pairs_on_a_real_clip(shared_data: Path) -> None:
    with av.open(str(shared_data / "clips" / "k400__arm_wrestling__demo.mp4")) as container:
        grey = [frame.to_ndarray(format="gray") for frame in islice(container.decode(video=0), 17)]
    no_guess = np.zeros((*grey[0].shape, 2), np.float32)
    flow = np.stack([cv2.calcOpticalFlowFarneback(a, b, no_guess, 0.5, 5, 15, 3, 5, 1.2, 0) for a, b in pairwise(grey)])
    jpeg_settings = CodecSettings(flow_codec="jpeg")
    ours, jpeg = encode_flow(flow), encode_flow(flow, jpeg_settings)
    our_error = flow_error(flow, decode_flow(ours, DEFAULT.flow_convention()), 20)
    jpeg_error = flow_error(flow, decode_flow(jpeg, jpeg_settings.flow_convention()), 20)
    assert len(ours) < len(jpeg) / 3
    assert our_error.mean < jpeg_error.mean
    assert our_error.rms < jpeg_error.rms


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="real-time priority is Linux's")
@pytest.mark.parametrize("rgb_codec", RGB_CODECS)
def test_encoding_leaves_no_thread_with_real_time_priority(rgb_codec: RGBCodec) -> None:
    writer = RGBEncoder(CodecSettings(rgb_codec=rgb_codec), height=64, width=64)
    for _ in range(3):
        writer.write(np.zeros((64, 64, 3), np.uint8))
    assert {os.sched_getscheduler(int(path.name)) for path in Path("/proc/self/task").iterdir()} == {os.SCHED_OTHER}
    assert writer.close()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_codes_of_another_size_than_the_first_frames_are_refused() -> None:
    """OpenCV writes what does not fit into an array of its own, and leaves the clip's part as it was."""
    target = np.zeros((4, 4, 2), np.uint16)
    codec_module._merge_into(target, [np.ones((4, 4), np.uint16), np.full((4, 4), 2, np.uint16)])
    assert target[..., 0].max() == 1
    assert target[..., 1].min() == 2
    for shape, dtype in (((4, 6), np.uint16), ((4, 4), np.uint8)):
        with pytest.raises(ValueError, match="another size than the first"):
            codec_module._merge_into(target, [np.ones(shape, dtype)] * 2)


def test_fast_decode_stores_the_same_frames_without_arithmetic_coding() -> None:
    """What the entropy coder does loses nothing: other bytes, and frames as good."""
    frames = [smooth_frame(64, 96, shift) for shift in range(12)]
    stored = {}
    for fast in (False, True):
        encoder = RGBEncoder(CodecSettings(fast_decode=fast), height=64, width=96)
        for frame in frames:
            encoder.write(frame)
        stored[fast] = encoder.close()
    assert stored[True] != stored[False]
    off = {fast: np.abs(decode_rgb(data).astype(int) - np.stack(frames)).mean() for fast, data in stored.items()}
    assert off[True] < off[False] * 1.05 + 0.1


def test_fast_decode_says_what_it_is_of() -> None:
    plain, fast = CodecSettings().describe_formats(), CodecSettings(fast_decode=True).describe_formats()
    for stream in ("flow", "rgb"):
        options = [formats[stream].get("video", formats[stream])["options"] for formats in (plain, fast)]
        assert options[1]["x264-params"] == options[0]["x264-params"] + ":cabac=0"
    mixed = CodecSettings(fast_decode=True, rgb_codec="av1").describe_formats()["rgb"]
    assert mixed == CodecSettings(rgb_codec="av1").describe_formats()["rgb"]
    with pytest.raises(SettingsError, match=r"--fast-decode is of H\.264"):
        CodecSettings(fast_decode=True, rgb_codec="av1", flow_codec="jpeg")


def test_tiny_frames_are_stored_at_a_quality_that_only_av1_knows() -> None:
    encoder = RGBEncoder(CodecSettings(rgb_codec="av1", rgb_quality=60), height=2, width=2)
    encoder.write(np.zeros((2, 2, 3), np.uint8))
    assert decode_rgb(encoder.close()).shape == (1, 2, 2, 3)


def smooth_frame(height: int, width: int, shift: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 9
    planes = [127 + 100 * np.sin(x + shift / 5 + phase) * np.cos(y) for phase in (0, 1, 2)]
    return np.stack(planes, -1).astype(np.uint8)
