"""What is saved where windows overlap: windows a second in one pass against decoding and computing each one anew.

    python benchmarks/features.py                  one window of 21 frames for every frame, both streams, on one core
    python benchmarks/features.py --device cuda    the same with flow and networks on a GPU
    python benchmarks/features.py --json           the figures on one line at the end

Both sides run in one process, with the same decoder, flow and networks (random weights of full width), in turns. The
naive loop is measured on a few windows from the middle of the video, of which it decodes exactly the frames that it
needs. That both give the same vectors is part of what is printed. On a CPU seconds are those of the processor, so that
other work on the machine counts little; on a GPU they are those of the wall.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
import tyro

import models
from jobs.extraction_log import format_table
from models import checkpoint
from models.checkpoint import Metadata
from models.input_spec import FRAMES_PER_SECOND, STREAMS, Stream
from pipelines import tvl1
from pipelines.features.compute import FeatureNetworks
from pipelines.features.settings import FeatureSettings
from pipelines.media import codec
from pipelines.media.decode import DecodeSettings, decode
from pipelines.tvl1.params import FlowPreset

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"
CLIP = CLIPS / "ucf101__ApplyEyeMakeup__v_ApplyEyeMakeup_g01_c01.avi"
SCALE = codec.CodecSettings().flow_scale
Vectors = dict[Stream, npt.NDArray[np.floating]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One pass over a video's windows against each window for itself."""

    video: str = str(CLIP)
    """A video file of 25 frames a second, two seconds longer than what is read of it: a shorter one is read whole."""
    window: int = 21
    """Frames of a window."""
    stride: int = 1
    """Frames between windows."""
    frames: int = 60
    """Frames of the video that the pass reads."""
    naive_windows: int = 4
    """Windows of the naive loop."""
    rounds: int = 2
    """Times that each side runs."""
    width: float = 1.0
    """Width of the networks."""
    flow_preset: FlowPreset = "faithful"
    """TV-L1 preset."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where flow and networks run."""
    json: bool = False
    """Print the figures as JSON, too, on the last line."""


def main(config: Benchmark) -> None:
    """Time both sides in turns."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tvl1.prewarm(backend_of(config))
    with tempfile.TemporaryDirectory() as folder:
        networks = draw_networks(config, Path(folder))
    extract(networks, config, 0, 2 * config.window)  # warm: kernels are compiled, weights packed
    times: list[tuple[float, float]] = []
    for _ in range(config.rounds):
        begin = read_clock(config)
        shared = extract(networks, config, 0, config.frames)
        middle = read_clock(config)
        starts = choose_starts(config)
        naive = [extract(networks, config, start, start + config.window + 1) for start in starts]
        count = len(shared["rgb"])
        times.append((count / (middle - begin), len(starts) / (read_clock(config) - middle)))
    error = max(compare(shared, one, start // config.stride) for one, start in zip(naive, starts, strict=True))
    report(config, times, error)


def read_clock(config: Benchmark) -> float:
    """Seconds."""
    return time.process_time() if config.device == "cpu" else time.perf_counter()


def backend_of(config: Benchmark) -> str:
    """The flow kernel for the device."""
    return "torch" if config.device == "cuda" else "cpu"


@torch.no_grad()
def draw_networks(config: Benchmark, folder: Path) -> FeatureNetworks:
    """Networks of random weights whose batch norm fits noise."""
    uris: dict[Stream, str] = {}
    for stream in STREAMS:
        torch.manual_seed(0)
        model = models.build("i3d", num_classes=400, stream=stream, width=config.width, bn_momentum=1.0)
        model(torch.randn(2, 3 if stream == "rgb" else 2, 16, 112, 112) / 2)
        checkpoint.save(folder / stream, model, Metadata(classes=tuple(map(str, range(400)))))
        uris[stream] = str(folder / stream)
    settings = FeatureSettings(window=config.window, stride=config.stride, pad="drop", flow_end="shorten", resize="256")
    return FeatureNetworks.load(uris, settings, device=config.device)


def choose_starts(config: Benchmark) -> list[int]:
    """First frames of the naive loop's windows, spread over the video."""
    last = config.frames - config.window - 1
    places = np.linspace(0, last // config.stride, config.naive_windows + 2)[1:-1]
    return [int(place) * config.stride for place in places]


def extract(networks: FeatureNetworks, config: Benchmark, start: int, stop: int) -> Vectors:
    """The vectors of all windows of frames `start` to `stop`, decoded from the file."""
    streams = {stream: networks.open(stream, SCALE if stream == "flow" else None) for stream in STREAMS}

    def iter_grey() -> Iterator[npt.NDArray[np.uint8]]:
        settings = DecodeSettings(fps=FRAMES_PER_SECOND, short_side=256)
        begin, end = start / FRAMES_PER_SECOND, stop / FRAMES_PER_SECOND
        for frame in decode(config.video, settings=settings, start=begin, end=end):
            streams["rgb"].push(frame)
            yield cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

    for flow in tvl1.iter_flow(iter_grey(), preset=config.flow_preset, backend=backend_of(config)):
        streams["flow"].push(codec.stack_components(codec.quantise(flow, SCALE)))
    return {stream: features.finish() for stream, features in streams.items()}


def compare(shared: Vectors, one: Vectors, place: int) -> float:
    """Largest difference of one window's vectors from those of the pass, relative to their largest value."""
    pairs = [(shared[stream][place], one[stream][0]) for stream in STREAMS]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def report(config: Benchmark, times: list[tuple[float, float]], error: float) -> None:
    """The table of rounds, and the ratio."""
    rows = [(str(i), f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}") for i, (a, b) in enumerate(times, 1)]
    print(format_table(("round", "one pass, windows/s", "each anew, windows/s", "ratio"), rows))
    ratio = statistics.median(a / b for a, b in times)
    where = torch.cuda.get_device_name() if config.device == "cuda" else "one core"
    print(
        f"median ratio {ratio:.2f}: {config.window} frames, stride {config.stride}, TV-L1 {config.flow_preset}, "
        f"networks of width {config.width:g}, {where}; vectors differ by {error:.1e} at most"
    )
    if config.json:
        one, anew = (statistics.median(side) for side in zip(*times, strict=True))
        figures = {"windows_per_s": one, "naive_windows_per_s": anew, "ratio": ratio, "difference": error}
        print(json.dumps({"device": where, **{name: float(f"{value:.4g}") for name, value in figures.items()}}))


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
