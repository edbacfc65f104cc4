"""Each preset against a plain re-implementation on a real clip, and the vectors against a plain I3D."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import SHARED_DATA
from i3d_reference import reference_features, released_variables
from plain_features import PLAIN, see_with
from test_decode import write_video
from test_features import encode

import models
from models import checkpoint
from models.checkpoint import Metadata
from models.input_spec import STREAMS
from models.pretrained import from_tensors
from pipelines import tvl1
from pipelines.clips.sampling import ClipSettings
from pipelines.features.compute import FeatureNetworks
from pipelines.features.layouts import VideoFacts, list_files, make_files
from pipelines.features.presets import PRESETS
from pipelines.features.settings import FeatureSettings
from pipelines.media import codec
from pipelines.media.decode import DecodeSettings, decode

SCALE = codec.CodecSettings().flow_scale
Frames = npt.NDArray[np.uint8]
# Frames of the clip that are enough to tell, of 81: whole windows, a tail, and for ms-tcn windows beyond either end.
LENGTHS = {"thumos14": 27, "thumos14-25fps": 27, "ms-tcn": 22, "ten-crop": 33}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real clip of 2.7 seconds, 30 frames a second, or one made here."""
    path = SHARED_DATA / "ut_interaction" / "kick" / "set2_41_17_2.avi"
    times = [round(index * 1000 / 30) for index in range(81)]
    folder = tmp_path_factory.mktemp("clip")
    return path if path.exists() else write_video(folder / "bars.mp4", frames=81, size=(344, 252), times=times)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a narrow I3D for each stream, of random weights."""
    folder = tmp_path_factory.mktemp("networks")
    for seed, stream in enumerate(STREAMS):
        torch.manual_seed(seed)
        model = models.build("i3d", num_classes=5, stream=stream, width=0.0625, bn_momentum=1.0)
        model(torch.randn(2, 3 if stream == "rgb" else 2, 16, 224, 224) / 2)  # batch norm that fits, so nothing dies
        checkpoint.save(folder / stream, model, Metadata(classes=tuple("abcde"), clips=ClipSettings().to_json()))
    return folder


def compute(networks: FeatureNetworks, frames: Frames, flow: npt.NDArray[np.float32]) -> dict[str, npt.NDArray]:
    """The features of a video by stream, pushed as the job does."""
    found = {}
    for stream in networks.streams:
        features = networks.open(stream, SCALE if stream == "flow" else None)
        for frame in frames if stream == "rgb" else flow:
            features.push(frame if stream == "rgb" else codec.stack_components(codec.quantise(frame, SCALE)))
        found[stream] = features.finish()
    return found


def at_preset(
    clip: Path, settings: FeatureSettings, length: int | None
) -> tuple[Frames, npt.NDArray[np.float32], float]:
    """The first frames of the clip at the rate and size of a preset, their flow, and their rate."""
    size = settings.frame_size
    sized = {"short_side": size} if isinstance(size, int) else {"frame_size": settings.resize}
    rates: list[float] = []
    decoded = decode(clip, settings=DecodeSettings(fps=settings.fps, **sized), on_rate=rates.append)  # type: ignore[arg-type]
    frames = np.stack(list(decoded))
    assert len(frames) in ((80, 81) if settings.fps == "native" else (67, 68))  # the clip's header counts one too many
    frames = frames[:length]
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    return frames, tvl1.flow(grey, preset="fast"), rates[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_what_its_plain_form_gives(name: str, clip: Path, folder: Path) -> None:
    settings = PRESETS[name].settings  # type: ignore[index]
    frames, flow, fps = at_preset(clip, settings, LENGTHS.get(name))
    assert fps == pytest.approx(30 if settings.fps == "native" else 25, abs=0.01)
    networks = FeatureNetworks.load({stream: str(folder / stream) for stream in STREAMS}, settings)
    video = VideoFacts(id="ID", num_frames=len(frames), fps=fps)
    files = encode(make_files(settings, networks.windows, video, compute(networks, frames, flow)))
    plain = PLAIN[name](frames, flow, {stream: see_with(checkpoint.load(folder / stream)[0]) for stream in STREAMS})
    if name == "video-features":
        plain |= {"ID_fps.npy": np.array(fps), "ID_timestamps_ms.npy": np.array([1000 * 64 / fps])}
    assert files.keys() == plain.keys() == set(list_files(settings, networks.streams, "ID"))
    for path, expected in plain.items():
        found = np.load(io.BytesIO(files[path]))
        assert found.shape == expected.shape
        assert found.dtype == (np.float64 if "_fps" in path or "_ms" in path else np.float32)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
@torch.no_grad()
def test_vectors_equal_a_plain_build(stream: str, tmp_path: Path) -> None:
    variables = released_variables(3 if stream == "rgb" else 2)
    checkpoint.save(tmp_path / stream, from_tensors(variables), Metadata(classes=tuple(map(str, range(400)))))
    settings = FeatureSettings(window=16, stride=8, resize="224")
    networks = FeatureNetworks.load({stream: str(tmp_path / stream)}, settings)
    draw = np.random.default_rng(0)
    if stream == "rgb":
        frames = draw.integers(0, 256, (24, 224, 224, 3), np.uint8)
        clip = torch.tensor(frames) / 127.5 - 1
        found = compute(networks, frames, np.zeros((0, 224, 224, 2), np.float32))["rgb"]
    else:
        flow = codec.dequantise(codec.quantise(draw.normal(0, 12, (23, 224, 224, 2)), SCALE), SCALE)
        clip = torch.tensor(np.concatenate([flow, flow[-1:]])) / 20
        found = compute(networks, np.zeros((0, 224, 224, 3), np.uint8), flow)["flow"]
    expected = torch.stack(
        [reference_features(variables, clip[t : t + 16].permute(3, 0, 1, 2)[None])[0] for t in (0, 8)]
    )
    assert found.shape == (2, 1024)
    assert np.abs(found - expected.numpy()).max() <= 1e-4 * expected.abs().max()
