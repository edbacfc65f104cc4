"""Windows, crops, vectors and layouts of features: every stream has the same windows, and no id leads elsewhere."""

from __future__ import annotations

import io
import itertools
import json
import runpy
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from test_decode import write_video
from test_plan import catalog_of

import models
from models import checkpoint
from models.checkpoint import Metadata
from models.input_spec import STREAMS, Stream
from pipelines import records
from pipelines.clips.sampling import ClipSettings, resize_frames
from pipelines.errors import NetworkError, RunError, SettingsError, VideoError
from pipelines.features import spool as spool_module
from pipelines.features.compute import BATCH, FeatureNetworks
from pipelines.features.crops import crop_frame
from pipelines.features.layouts import ArrayFile, VideoFacts, file_name, list_files, make_files, make_rows, make_schema
from pipelines.features.plan import FeaturePlan, Limits, make_task, plan_videos
from pipelines.features.presets import PRESETS, find_preset, list_overridden
from pipelines.features.settings import FeatureSettings, FlowEnd, Layout, Pad
from pipelines.features.sidecar import describe_features
from pipelines.features.spool import Spool
from pipelines.features.windows import NOTHING, Windows, count_frames
from pipelines.media import codec
from pipelines.training.trained_network import hash_weights

SCALE = codec.CodecSettings().flow_scale
CLIPS = ClipSettings()
PADS: tuple[Pad, ...] = ("loop", "drop", "repeat", "zeros")
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FLOW_ENDS: tuple[FlowEnd, ...] = ("repeat", "zero", "shorten")
SMALL = FeatureSettings(window=9, stride=4, resize="40")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def save(folder: Path, stream: Stream, *, clips: ClipSettings = CLIPS, **settings: Any) -> str:
    """A checkpoint of an I3D that sees 32 px, with random weights."""
    torch.manual_seed(STREAMS.index(stream))
    settings = {"width": 0.0625, "size": 32, "frames": 16, "bn_momentum": 1.0} | settings
    model = models.build("i3d", num_classes=5, stream=stream, **settings)
    model(torch.randn(4, 3 if stream == "rgb" else 2, 16, 32, 32) / 2)  # batch norm that fits, so nothing dies
    checkpoint.save(folder, model, Metadata(classes=tuple("abcde"), clips=clips.to_json()))
    return str(folder)


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> dict[Stream, str]:
    folder = tmp_path_factory.mktemp("networks")
    return {stream: save(folder / stream, stream) for stream in STREAMS}


def draw_video(length: int, height: int = 40, width: int = 52) -> dict[Stream, npt.NDArray]:
    """Random frames, and codes of random flow, which has one frame fewer."""
    draw = np.random.default_rng(length)
    frames = draw.integers(0, 256, (length, height, width, 3), np.uint8)
    flow = draw.normal(0, 9, (max(0, length - 1), height, width, 2))
    return {"rgb": frames, "flow": codec.stack_components(codec.quantise(flow, SCALE))}


def compute(networks: FeatureNetworks, video: dict[Stream, npt.NDArray]) -> dict[Stream, npt.NDArray]:
    found = {}
    for stream in networks.streams:
        features = networks.open(stream, SCALE if stream == "flow" else None)
        for frame in video[stream]:
            features.push(frame)
        found[stream] = features.finish()
    return found


def see(networks: FeatureNetworks, stream: Stream, clip: npt.NDArray) -> npt.NDArray:
    """The vector of one clip (T, 32, 32, C) in [-1, 1]."""
    tensor = torch.tensor(clip, dtype=torch.float32).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        return networks.networks[stream].model.pooled_features(tensor)[0].numpy()


# Windows


@pytest.mark.parametrize("pad", PADS)
def test_windows_are_those_that_a_search_finds(pad: Pad) -> None:
    for length, window, stride, step in itertools.product(range(1, 24), (1, 4, 5), (1, 3, 7), (1, 2)):
        windows = Windows(window=window, stride=stride, frame_step=step, pad=pad)
        starts = range(0, length, stride)
        match pad:
            case "loop" | "drop":
                found = [start for start in starts if start + window * step <= length]
                found = found or [0] * (pad == "loop")
            case "repeat":
                # One more as long as the last frame has not been shown.
                found = [start for start in starts if start == 0 or start - stride + window * step < length]
            case "zeros":
                found = [middle - window // 2 * step for middle in starts]
        assert [windows.first(place) for place in range(windows.count(length))] == found
        for place in range(len(found)):
            frames = windows.frames(place, length)
            assert len(frames) == window
            assert set(frames) <= {*range(length), *([NOTHING] if pad == "zeros" else [])}


def test_each_window_shows_every_fourth_frame_of_four_times_as_many() -> None:
    windows = Windows.of(replace(SMALL, window=16, stride=64), frame_step=4)
    assert windows.span == 64
    assert windows.count(127) == 1
    assert windows.frames(1, 128).tolist() == list(range(64, 128, 4))


@pytest.mark.parametrize("pad", PADS)
def test_no_window_lasts_beyond_its_video(pad: Pad) -> None:
    for length in (1, 5, 9, 10, 30):
        times = Windows.of(replace(SMALL, pad=pad), 1).times(length, fps=30000 / 1001)
        assert times.shape == (Windows.of(replace(SMALL, pad=pad), 1).count(length), 2)
        assert ((times[:, 0] >= 0) & (times[:, 0] < times[:, 1]) & (times[:, 1] <= length / (30000 / 1001))).all()
    assert Windows.of(SMALL, 1).times(5, 10.0).tolist() == [[0, 0.5]]  # looped


# Crops


def test_ten_crops_are_corners_centre_and_their_mirrors() -> None:
    frame = np.arange(5 * 7 * 3).reshape(5, 7, 3)
    crops = crop_frame(frame, 3, 10)
    plain = [frame[:3, :3], frame[:3, 4:], frame[2:, :3], frame[2:, 4:], frame[1:4, 2:5]]
    assert crops.tolist() == [crop.tolist() for crop in [*plain, *(crop[:, ::-1] for crop in plain)]]
    assert crop_frame(frame, 3, 5).tolist() == crops[:5].tolist()
    assert crop_frame(frame, 3, 1).tolist() == crops[4:5].tolist()
    with pytest.raises(ValueError, match="7×5 px, and the crop is 6×6"):
        crop_frame(frame, 6, 1)


@pytest.mark.parametrize("name", ["h264", "lossless", "jpeg"])
def test_mirrored_flow_has_u_negated(name: codec.FlowCodec) -> None:
    scale = codec.CodecSettings(flow_codec=name).flow_scale
    flow = np.random.default_rng(0).normal(0, 15, (8, 9, 2)).astype(np.float32)
    codes = codec.quantise(flow, scale)
    kept = codec.dequantise(codes, scale)
    mirrored = np.stack([-kept[:, ::-1, 0], kept[:, ::-1, 1]], axis=-1)
    crops = crop_frame(codes, 8, 10, scale)
    assert crops.dtype == codes.dtype
    np.testing.assert_allclose(codec.dequantise(crops[5], scale), mirrored[:8, 1:], atol=1e-4)
    np.testing.assert_allclose(crop_frame(kept, 8, 10)[5], mirrored[:8, 1:])


# Settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stride": 0}, "--stride is 0"),
        ({"window": 0}, "--window is 0"),
        ({"fps": 0.0}, "--fps is 0.0"),
        ({"fps": float("nan")}, "--fps is nan"),
        ({"resize": "340*256"}, "--resize is '340"),
        ({"resize": "341x256"}, "even numbers"),
        ({"resize": "0"}, "--resize is '0'"),
        ({"resize": "2050"}, "--resize is '2050'"),  # what no video is decoded at
        ({"resize": "2048x224"}, "--resize is '2048x224'"),
        ({"crops": 10, "layout": "video-features"}, "no axis for crops"),
        ({"crops": 5, "layout": "npy-transposed"}, "no axis for crops"),
        ({"streams": ()}, "--streams is empty"),
        ({"streams": ("rgb", "rgb")}, "once each"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("*", r"\*")) as caught:
        FeatureSettings(**flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"window": 8}, "--window is 8, too short for --rgb: .*time steps"),
        ({"resize": "30"}, "--resize is 30, and --rgb sees 32 px"),
        ({"resize": "64x30"}, "--resize is 64x30"),
        ({"streams": ("flow",)}, "--flow must name a network"),
    ],
)
def test_settings_that_do_not_go_with_the_network_are_refused(
    uris: dict[Stream, str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        FeatureNetworks.load({"rgb": uris["rgb"]}, replace(SMALL, **flags))


def test_networks_that_cannot_share_windows_or_frames_are_refused(uris: dict[Stream, str], tmp_path: Path) -> None:
    slow = save(tmp_path / "slow", "flow", frame_step=4)
    with pytest.raises(SettingsError, match=r"every 1. frame of RGB and every 4. of flow"):
        FeatureNetworks.load({"rgb": uris["rgb"], "flow": slow}, SMALL)
    large = save(tmp_path / "large", "flow", size=64)
    with pytest.raises(SettingsError, match=r"frames of 38 px \(RGB\) and 74 px \(flow\)"):
        FeatureNetworks.load({"rgb": uris["rgb"], "flow": large}, replace(SMALL, resize=None))
    with pytest.raises(NetworkError, match=r"--flow .*needed is one of flow"):
        FeatureNetworks.load({"flow": uris["rgb"]}, SMALL)


def test_a_flag_wins_over_its_preset() -> None:
    settings = replace(find_preset("ten-crop").settings, crops=5, fps=25.0, streams=("rgb",))
    assert list_overridden("ten-crop", settings) == {"crops": 10, "fps": "native"}
    with pytest.raises(SettingsError, match="--preset is 'thumos15': choose one of thumos14, "):
        find_preset("thumos15")
    with pytest.raises(SettingsError, match="no axis for crops"):
        replace(find_preset("ten-crop").settings, layout="video-features")


def test_what_networks_see_is_in_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same weights may be given other windows, crops and scales."""

    def plan(name: str, clips: ClipSettings, **settings: Any) -> FeaturePlan:
        uris: dict[Stream, str] = {"flow": save(tmp_path / name, "flow", clips=clips, **settings)}
        networks = FeatureNetworks.load(uris, replace(SMALL, window=16))
        task = make_task(
            networks, uris, limits=Limits(), flow_preset="fast", which="last", precision="fp32", stored=None
        )
        found = catalog_of({"train": 2})
        return plan_videos(found, task, networks, videos="/videos", output="out", kernel="cpu", size=2)

    plain = plan("plain", ClipSettings())
    others = [
        plan("step", ClipSettings(), frame_step=2),
        plan("square", ClipSettings(resize="square")),
        plan("bound", ClipSettings(flow_bound=8.0)),
    ]
    assert {str(other.record.settings["weights"]) for other in others} == {str(plain.record.settings["weights"])}
    assert len({plan.fingerprint for plan in (plain, *others)}) == 4
    assert plan("again", ClipSettings()).fingerprint == plain.fingerprint
    monkeypatch.setitem(BATCH, "cuda", 8)
    assert plan("batch", ClipSettings()).fingerprint != plain.fingerprint


# Vectors


@pytest.mark.parametrize(("pad", "flow_end"), itertools.product(PADS, FLOW_ENDS))
def test_both_streams_have_the_windows_that_the_length_says(
    uris: dict[Stream, str], pad: Pad, flow_end: FlowEnd
) -> None:
    settings = replace(SMALL, pad=pad, flow_end=flow_end)
    networks = FeatureNetworks.load(uris, settings)
    for length in (2, 9, 10, 13, 14, 20):  # whole windows just fit, and just do not
        count = networks.windows.count(count_frames(settings, length))
        if count:
            found = compute(networks, draw_video(length))
            assert {vectors.shape for vectors in found.values()} == {(count, 64)}
        else:
            assert pad == "drop"
            for stream in STREAMS:
                with pytest.raises(VideoError, match="a window spans 9") as caught:
                    compute(
                        FeatureNetworks({stream: networks.networks[stream]}, settings, networks.device),
                        draw_video(length),
                    )
                assert caught.value.kind == "too_short"


def test_vectors_are_those_of_the_frames_that_the_windows_name(uris: dict[Stream, str]) -> None:
    video = draw_video(15)
    rgb = video["rgb"][:, 4:36, 10:42] / 127.5 - 1
    flow = codec.dequantise(codec.split_components(video["flow"]), SCALE)[:, 4:36, 10:42] / 20
    black = np.zeros((1, 32, 32, 3)), np.zeros((1, 32, 32, 2))
    last = {"repeat": flow[-1:], "zero": black[1]}
    for pad, flow_end in itertools.product(PADS, ("repeat", "zero")):
        networks = FeatureNetworks.load(uris, replace(SMALL, pad=pad, flow_end=flow_end))  # type: ignore[arg-type]
        found = compute(networks, video)
        sources = {"rgb": np.concatenate([rgb, black[0]]), "flow": np.concatenate([flow, last[flow_end], black[1]])}
        for stream, place in itertools.product(STREAMS, range(networks.windows.count(15))):
            # NOTHING is -1, the black frame.
            expected = see(networks, stream, sources[stream][networks.windows.frames(place, 15)])
            np.testing.assert_allclose(found[stream][place], expected, atol=1e-5 * np.abs(expected).max())


def test_a_network_of_every_fourth_frame_gets_every_fourth_frame(tmp_path: Path) -> None:
    networks = FeatureNetworks.load({"rgb": save(tmp_path, "rgb", frame_step=4)}, replace(SMALL, stride=7))
    video = draw_video(50)
    rgb = video["rgb"][:, 4:36, 10:42] / 127.5 - 1
    expected = np.stack([see(networks, "rgb", rgb[start : start + 36 : 4]) for start in (0, 7, 14)])
    np.testing.assert_allclose(compute(networks, video)["rgb"], expected, atol=1e-5 * np.abs(expected).max())


def test_a_vector_depends_on_its_window_alone_and_comes_out_the_same_again(uris: dict[Stream, str]) -> None:
    networks = FeatureNetworks.load(uris, replace(SMALL, crops=5))
    first = compute(networks, draw_video(30))
    compute(networks, draw_video(11))
    again, fresh = (
        compute(networks, draw_video(30)),
        compute(FeatureNetworks.load(uris, networks.settings), draw_video(30)),
    )
    cut = {stream: frames[4 : 4 + 9 + (stream == "rgb")] for stream, frames in draw_video(30).items()}
    for stream in STREAMS:
        assert first[stream].tobytes() == again[stream].tobytes() == fresh[stream].tobytes()
        assert compute(networks, cut)[stream][0].tobytes() == first[stream][1].tobytes()


def test_larger_batches_as_on_gpus_give_the_same_but_for_rounding(
    uris: dict[Stream, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = FeatureNetworks.load(uris, replace(SMALL, crops=10, pad="zeros"))
    one = compute(networks, draw_video(30))
    monkeypatch.setitem(BATCH, "cpu", 16)  # of the 10 crops of 8 windows: 5 batches
    many = compute(FeatureNetworks.load(uris, networks.settings), draw_video(30))
    for stream in STREAMS:
        np.testing.assert_allclose(many[stream], one[stream], atol=1e-5 * np.abs(one[stream]).max(), rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])  # the last is infinity in float16
def test_vectors_that_are_no_finite_numbers_end_the_run(
    uris: dict[Stream, str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    networks = FeatureNetworks.load({"rgb": uris["rgb"]}, replace(SMALL, dtype="float16"))
    model = networks.networks["rgb"].model
    monkeypatch.setattr(model, "pooled_features", lambda clips: torch.full((len(clips), 64), value))
    with pytest.raises(RunError, match=r"^the network of --rgb gives NaN or infinity: .* --dtype float32"):
        compute(networks, draw_video(10))


@pytest.mark.parametrize("said", ["cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "can't allocate memory"])
def test_a_network_that_fails_ends_the_run_and_is_no_fault_of_the_video(
    uris: dict[Stream, str], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    networks = FeatureNetworks.load({"rgb": uris["rgb"]}, SMALL)

    def fail(_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(networks.networks["rgb"].model, "pooled_features", fail)
    with pytest.raises(RunError, match=f"^the network of --rgb failed on cpu: {said}$"):
        compute(networks, draw_video(10))


@pytest.mark.slow
def test_the_benchmark_compares_equal_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "features.py"))
    video = str(write_video(tmp_path / "bars.mp4", frames=60))
    small = {"window": 9, "frames": 14, "naive_windows": 2, "rounds": 1, "width": 0.0625, "flow_preset": "fast"}
    benchmark["main"](benchmark["Benchmark"](video=video, json=True, **small))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["difference"] < 1e-5
    assert figures["windows_per_s"] > 0
    assert figures["ratio"] == pytest.approx(figures["windows_per_s"] / figures["naive_windows_per_s"], rel=0.01)


@pytest.mark.parametrize(
    ("window", "stride", "pad"), [(9, 1, "zeros"), (9, 4, "loop"), (9, 30, "drop"), (9, 7, "repeat")]
)
def test_no_more_frames_are_kept_than_a_window_has(uris: dict[Stream, str], window: int, stride: int, pad: Pad) -> None:
    networks = FeatureNetworks.load(uris, replace(SMALL, window=window, stride=stride, pad=pad))
    features = networks.open("rgb")
    most = 0
    for frame in draw_video(100)["rgb"]:
        features.push(frame)
        most = max(most, len(features._frames))
    assert 0 < most <= window
    assert len(features.finish()) == networks.windows.count(100)


def test_frames_of_another_size_are_resized_and_flow_with_its_vectors(uris: dict[Stream, str]) -> None:
    networks = FeatureNetworks.load(uris, replace(SMALL, resize="52x40", stride=9))
    video = draw_video(10, height=80, width=78)
    flow = codec.dequantise(codec.split_components(video["flow"]), SCALE)
    rgb = resize_frames(video["rgb"], (40, 52))[:, 4:36, 10:42] / 127.5 - 1
    uv = np.clip(resize_frames(flow, (40, 52))[:, 4:36, 10:42] / 20, -1, 1)
    assert np.abs(uv[..., 0]).max() < np.abs(flow[..., 0]).max() / 20  # narrower by a third, and so is the motion
    found = compute(networks, video)
    for stream, clip in (("rgb", rgb), ("flow", uv)):
        expected = see(networks, stream, clip[:9])  # type: ignore[arg-type]
        np.testing.assert_allclose(found[stream][0], expected, atol=1e-5 * np.abs(expected).max())  # type: ignore[index]


def test_frames_of_a_hopeless_shape_are_the_videos_fault(uris: dict[Stream, str]) -> None:
    with pytest.raises(VideoError, match="over 8 times the other") as caught:
        compute(FeatureNetworks.load(uris, SMALL), draw_video(2, height=4, width=40))
    assert caught.value.kind == "bad_shape"


def test_a_video_of_one_frame_has_no_flow(uris: dict[Stream, str]) -> None:
    networks = FeatureNetworks.load(uris, SMALL)
    with pytest.raises(VideoError, match="one frame, and so no flow"):
        compute(networks, draw_video(1))
    zero = FeatureNetworks.load(uris, replace(SMALL, flow_end="zero"))
    assert compute(zero, draw_video(1))["flow"].shape == (1, 64)


# Layouts


def lay_out(layout: Layout, crops: Any = 1, streams: Sequence[Stream] = STREAMS) -> tuple[Any, ...]:
    settings = replace(SMALL, layout=layout, crops=crops)
    shape = (3, 8) if crops == 1 else (3, crops, 8)
    features = {stream: np.random.default_rng(len(stream)).normal(size=shape).astype(np.float32) for stream in streams}
    return settings, Windows.of(settings, 1), VideoFacts(id="a~b", num_frames=17, fps=10.0, split="test"), features


def encode(files: Iterable[ArrayFile]) -> dict[str, bytes]:
    """What lies at each path."""
    found = {}
    for array in files:
        sink = io.BytesIO()
        array.write(sink)
        found[array.path] = sink.getvalue()
    return found


@pytest.mark.parametrize(
    ("layout", "crops", "shapes"),
    [
        ("npy", 1, {"a~b.npy": (3, 16)}),
        ("npy", 10, {"a~b.npy": (3, 10, 16)}),
        ("npy-streams", 5, {"rgb/a~b.npy": (3, 5, 8), "flow/a~b.npy": (3, 5, 8)}),
        ("npy-transposed", 1, {"a~b.npy": (16, 3)}),
        (
            "video-features",
            1,
            {"a~b_rgb.npy": (3, 8), "a~b_flow.npy": (3, 8), "a~b_fps.npy": (), "a~b_timestamps_ms.npy": (3,)},
        ),
        ("parquet", 10, {}),
    ],
)
def test_arrays_have_the_shapes_of_their_layout(layout: Layout, crops: int, shapes: dict[str, tuple[int, ...]]) -> None:
    files = encode(make_files(*lay_out(layout, crops)))
    assert {path: np.load(io.BytesIO(data)).shape for path, data in files.items()} == shapes
    assert list(files) == list_files(lay_out(layout, crops)[0], STREAMS, "a~b")
    assert files == encode(make_files(*lay_out(layout, crops)))


def test_rgb_comes_before_flow_whatever_the_order() -> None:
    settings, windows, video, features = lay_out("npy")
    files = encode(make_files(settings, windows, video, dict(reversed(features.items()))))
    array = np.load(io.BytesIO(files["a~b.npy"]))
    assert array.tolist() == np.concatenate([features["rgb"], features["flow"]], axis=1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_is_a_window_of_a_stream_and_crop(dtype: Any) -> None:
    settings, windows, video, features = lay_out("parquet", 5)
    settings = replace(settings, dtype=dtype)
    features = {stream: vectors.astype(dtype) for stream, vectors in features.items()}
    table = pa.concat_tables(make_rows(settings, windows, video, features))
    assert table.schema == make_schema(settings)
    rows = table.to_pylist()
    assert len(rows) == 2 * 3 * 5
    row = rows[15 + 2 * 5 + 3]
    assert (row["id"], row["stream"], row["window"], row["crop"], row["split"]) == ("a~b", "flow", 2, 3, "test")
    assert (row["start_s"], row["end_s"]) == (0.8, 1.7)
    assert np.array(row["features"], dtype).tolist() == features["flow"][2, 3].tolist()


@pytest.mark.parametrize(("layout", "crops"), [*((name, 1) for name in LAYOUTS), ("npy", 5), ("parquet", 10)])
def test_features_on_disk_are_written_block_by_block_as_those_in_memory(
    layout: Layout, crops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of one window, of two, and of more than there are; the vectors come in pieces too."""
    settings, windows, video, features = lay_out(layout, crops)
    whole = encode(make_files(settings, windows, video, features))
    rows = pa.concat_tables(make_rows(settings, windows, video, features))
    for path, data in whole.items():
        assert np.lib.format.read_magic(io.BytesIO(data)) == (1, 0)
        sink = io.BytesIO()
        np.save(sink, np.load(io.BytesIO(data)))
        assert sink.getvalue() == data, path
    spool = Spool()
    for stream, vectors in features.items():
        for part in (vectors[:0], vectors[:2], vectors[2:]):
            spool.add({stream: part})
    for size in (1, 2 * 4 * 8 * crops, 1 << 20):
        monkeypatch.setattr(spool_module, "BLOCK_BYTES", size)
        assert encode(make_files(settings, windows, video, spool.vectors)) == whole
        tables = list(make_rows(settings, windows, video, spool.vectors))
        assert pa.concat_tables(tables).equals(rows)
        assert layout != "parquet" or len(tables) == 2 * {1: 3, 1 << 20: 1}.get(size, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_hours_cost_no_memory(layout: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spool_module, "BLOCK_BYTES", 1 << 20)
    settings = replace(SMALL, layout=layout, stride=1)
    windows = Windows.of(settings, 1)
    video = VideoFacts(id="ID", num_frames=8000 + 8, fps=30.0)
    held = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        spool = Spool()
        for _ in range(80):
            spool.add({stream: np.ones((100, 1024), np.float32) for stream in STREAMS})
        for array in make_files(settings, windows, video, spool.vectors):
            with (tmp_path / Path(array.path).name).open("wb") as file:
                array.write(file)
        for table in make_rows(settings, windows, video, spool.vectors):
            held = max(held, table.nbytes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(vectors.shape[0] * 4096 for vectors in spool.vectors.values())
    assert total == 2 * 8000 * 4096
    assert peak < total / 8
    assert held < total / 8


def test_vectors_that_are_taken_as_they_come_are_those_of_the_end(uris: dict[Stream, str]) -> None:
    networks = FeatureNetworks.load(uris, replace(SMALL, crops=5))
    video = draw_video(60)
    expected = compute(networks, video)
    for batch in (1, 3):  # 3: a batch ends within the crops of a window
        spool, pieces = Spool(), 0
        for stream in STREAMS:
            features = networks.open(stream, SCALE if stream == "flow" else None)
            features.batch = batch
            for frame in video[stream]:
                features.push(frame)
                taken = features.take()
                pieces += len(taken) > 0
                spool.add({stream: taken})
            spool.add({stream: features.finish()})
        assert pieces > 10
        for stream in STREAMS:
            assert spool.vectors[stream].shape == expected[stream].shape
            tolerance = {1: 0, 3: 1e-4 * np.abs(expected[stream]).max()}[batch]
            np.testing.assert_allclose(spool.vectors[stream][:], expected[stream], atol=tolerance, rtol=0)


def test_beside_arrays_a_row_says_when_a_window_is() -> None:
    (table,) = make_rows(*lay_out("npy"))
    assert table.column_names == ["id", "class_name", "split", "window", "start_s", "end_s"]
    assert table["start_s"].to_pylist() == [0, 0.4, 0.8]


@pytest.mark.parametrize(
    "id", ["../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "a\\b", "a\0b", "höhe", "x" * 400, "a b.mp4", "~"]
)
@pytest.mark.parametrize("layout", ["npy", "npy-streams", "npy-transposed", "video-features"])
def test_no_id_leads_out_of_the_folder(id: str, layout: Layout, tmp_path: Path) -> None:
    settings, windows, video, features = lay_out(layout)
    for path, data in encode(make_files(settings, windows, replace(video, id=id), features)).items():
        parts = PurePosixPath(path).parts
        assert len(parts) == (2 if layout == "npy-streams" else 1)
        assert not {"..", ".", "/"} & set(parts)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
        assert (tmp_path / path).resolve().is_relative_to(tmp_path)


def test_ids_of_a_catalog_are_their_files_names_and_no_two_ids_share_one() -> None:
    assert file_name("v_Archery_g01~c02") == "v_Archery_g01~c02"
    names = [file_name(id) for id in ("a/b", "a b", "a", "../a", "..a", "A")]
    assert len(set(names)) == len(names)


# Sidecar


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_sidecar_says_all_that_decides(preset: str | None, uris: dict[Stream, str]) -> None:
    settings = replace(find_preset(preset).settings if preset else FeatureSettings(), resize="256")
    networks = FeatureNetworks.load(uris, settings)
    flow = {"convention": codec.CodecSettings().flow_convention(), "preset": "faithful", "kernel": "cpu"}
    values: Any = json.loads(
        records.encode(
            describe_features(
                networks,
                preset=preset,
                precision="fp32",
                weights=uris,
                decoding={"resize_filter": "bilinear"},
                flow=flow,
            )
        )
    )
    model, _ = checkpoint.load(uris["flow"])
    assert values["networks"]["flow"]["weights_sha256"] == hash_weights(model) == networks.hashes["flow"]
    assert values["settings"]["streams"] == ["rgb", "flow"]
    assert values["settings"]["window"] == settings.window
    assert values["flow"]["convention"]["bound_px"] == 20
    if preset is None:
        assert values["preset"] is None
        return
    assert values["preset"]["overridden"] == ({"resize": "340x256"} if preset == "thumos14" else {})
    assert any("TV-L1" in line for line in values["preset"]["differs"])
    assert values["preset"]["equal_count"] == PRESETS[preset].equal_count  # type: ignore[index]
