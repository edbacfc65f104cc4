"""I3D's vectors of a video's windows, from frames that come one by one.

Of a video only the frames of windows that are not yet complete are kept, cropped and as integers. So they cost the same
memory whatever its length, and each is decoded, and its flow computed, once, however many windows show it. So do the
vectors, 4 KB a window and stream, where the caller takes them as windows are complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import cuda
from models.folding import fold_batch_norm
from models.i3d import I3D
from models.input_spec import CHANNELS, STREAMS, InputSpec, Stream
from pipelines.clips.sampling import (
    FLOW_BOUND,
    ClipSettings,
    decoded_side,
    needs_resize,
    resize_for_crop,
    resize_frames,
)
from pipelines.clips.tensors import scale_clips
from pipelines.errors import NetworkError, RunError, SettingsError, VideoError
from pipelines.features.crops import crop_frame
from pipelines.features.settings import FeatureSettings, FrameSize
from pipelines.features.windows import Windows, count_frames
from pipelines.media.codec import FlowScale, dequantise, split_components
from pipelines.media.resize import output_size
from pipelines.training.trained_network import hash_weights, load_network
from pipelines.training.weights_files import Which

# Clips that go through a network at a time. On CPUs one, which is as fast there: so no vector depends on what else was
# in its batch, nor on which video a worker had before, by whose shape oneDNN packed the weights. On GPUs a video's
# batches are always the same, and so its bytes; in other batches its vectors would differ by rounding, about 1e-6.
BATCH = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True, kw_only=True)
class StreamNetwork:
    """The network of one stream, folded and on its device, with what it wants of frames and what its weights are."""

    stream: Stream
    model: Any  # a folded I3D: it keeps its class's methods, which type checkers take for tensors
    input_spec: InputSpec
    clips: ClipSettings
    sha256: str

    @property
    def frame_step(self) -> int:
        """Of every so many frames the network was trained on one."""
        (sampling,) = self.input_spec.train.streams.values()
        return sampling.frame_step

    @property
    def channels(self) -> int:
        """Length of its vectors."""
        return self.model.trunk.out_channels


class FeatureNetworks:
    """The networks of a worker, one for each stream; kept from video to video.

    settings   as given, `streams` resolved
    windows    the same for all streams
    networks   by stream, RGB before flow
    """

    def __init__(
        self, networks: Mapping[Stream, StreamNetwork], settings: FeatureSettings, device: torch.device
    ) -> None:
        check_networks(networks, settings)
        self.networks, self.device = dict(networks), device
        self.settings = replace(settings, streams=tuple(networks))
        self.windows = Windows.of(settings, next(iter(networks.values())).frame_step)

    @classmethod
    def load(
        cls,
        uris: Mapping[Stream, str],
        settings: FeatureSettings,
        *,
        which: Which = "last",
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> FeatureNetworks:
        """Load a network for each stream.

        Raises NetworkError where there is no I3D of that stream, SettingsError where the settings do not go with the
        networks (a window that is too short, frames smaller than the crop, networks of different frame steps), and
        models.cuda.ConvolutionError where the device computes wrong numbers.
        """
        device = torch.device(device)
        streams = settings.chosen_streams(tuple(stream for stream in STREAMS if stream in uris))
        cuda.set_up(device, precision, training=False)
        networks = {
            stream: load_stream(stream, uris[stream], which=which, precision=precision, device=device)
            for stream in streams
        }
        return cls(networks, settings, device)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """RGB before flow."""
        return tuple(self.networks)

    @property
    def hashes(self) -> dict[Stream, str]:
        """SHA-256 of each network's tensors with their names."""
        return {stream: network.sha256 for stream, network in self.networks.items()}

    @property
    def frame_size(self) -> FrameSize:
        """Size to decode at: what the settings say, else what the networks were trained on."""
        if (size := self.settings.frame_size) is not None:
            return size
        return max(decoded_side(network.input_spec, network.clips) for network in self.networks.values())

    @property
    def flow_bound(self) -> float:
        """Pixels that flow must be clipped to, or more: the flow network's bound; 20 without one."""
        return self.networks["flow"].clips.bound if "flow" in self.networks else FLOW_BOUND

    def open(self, stream: Stream, scale: FlowScale | None = None) -> StreamFeatures:
        """The features of one video's stream. `scale` is that of the flow's codes."""
        assert (scale is not None) == (stream == "flow"), "flow comes in codes, and only flow"
        return StreamFeatures(self, stream, scale)


def load_stream(stream: Stream, uri: str, *, which: Which, precision: str, device: torch.device) -> StreamNetwork:
    """The I3D of one stream. Raises NetworkError."""
    try:
        network = load_network(uri, stream=stream, which=which)
    except NetworkError as error:
        raise NetworkError(f"--{stream} {error}") from error
    if not isinstance(network.model, I3D):
        raise NetworkError(f"--{stream} {uri}: features are I3D's; this is another network")
    folded = fold_batch_norm(network.model, dtype=cuda.DTYPES[precision])
    return StreamNetwork(
        stream=stream,
        model=cuda.place(folded, device),
        input_spec=network.model.input_spec,
        clips=network.settings,
        sha256=hash_weights(network.model),
    )


def check_networks(networks: Mapping[Stream, StreamNetwork], settings: FeatureSettings) -> None:
    """Raises SettingsError where settings cannot be with these networks."""
    steps = {stream: network.frame_step for stream, network in networks.items()}
    if len(set(steps.values())) > 1:
        raise SettingsError(
            f"the networks were trained on every {steps['rgb']}. frame of RGB and every {steps['flow']}. of flow, so "
            "their windows would differ: extract their streams one by one, by --streams rgb and --streams flow"
        )
    sides = {stream: decoded_side(network.input_spec, network.clips) for stream, network in networks.items()}
    if settings.frame_size is None and len(set(sides.values())) > 1:
        raise SettingsError(
            f"the networks were trained on frames of {sides['rgb']} px (RGB) and {sides['flow']} px (flow): say by "
            "--resize which size both get"
        )
    for stream, network in networks.items():
        try:
            network.model.check_frames(settings.window)
        except ValueError as error:
            raise SettingsError(f"--window is {settings.window}, too short for --{stream}: {error}") from error
        size = settings.frame_size
        shorter = min(size) if isinstance(size, tuple) else size
        if shorter is not None and shorter < network.input_spec.size:
            raise SettingsError(
                f"--resize is {settings.resize}, and --{stream} sees {network.input_spec.size} px: give at least that"
            )


class StreamFeatures:
    """The features of one stream of one video, whose frames are pushed one by one."""

    def __init__(self, networks: FeatureNetworks, stream: Stream, scale: FlowScale | None) -> None:
        self.stream = stream
        self.settings, self.windows, self.device = networks.settings, networks.windows, networks.device
        self.network = networks.networks[stream]
        self.batch = BATCH[self.device.type]
        self.num_pushed = 0
        self._codes = self._scale = scale  # of the frames that come, and of those that are kept
        self._newest: npt.NDArray[Any] | None = None  # pushed and not yet taken: perhaps the last
        self._num_taken = 0
        self._frames: dict[int, Tensor] = {}  # (crops, size, size, C) by index, of windows that are not complete
        self._place = 0  # the next window
        self._clips: list[Tensor] = []  # (crops, T, size, size, C) of windows that wait for a whole batch
        self._missing: list[Tensor] = []  # (crops, T), which of their frames are zero
        self._vectors = bytearray()  # grows in place, where a list of arrays would be copied at the end

    def push(self, frame: npt.NDArray[Any]) -> None:
        """The next frame: (H, W, 3) uint8 RGB, or (2H, W) codes of flow, u over v, as the encoder takes them.

        A frame of another size than the settings say is resized. Raises VideoError("bad_shape") where one side is over
        eight times as long as the other.
        """
        if self._newest is not None:
            self._take(self._newest)
        self._newest = frame
        self.num_pushed += 1

    def finish(self) -> npt.NDArray[np.floating]:
        """The vectors that were not taken; see `take`.

        Raises VideoError("too_short") where the video has no window: no frames for one, or one frame and so no flow.
        """
        length = self._finish_frames()
        for place in range(self._place, self.windows.count(length)):
            self._show(self.windows.frames(place, length))
        self._compute(least=1)
        return self.take()

    def take(self) -> npt.NDArray[np.floating]:
        """The vectors that came since the last time, in order, of whole windows.

        (windows, channels), or (windows, crops, channels) of more than one crop; in the settings' dtype.
        """
        channels, crops = self.network.channels, self.settings.crops
        vectors = np.frombuffer(self._vectors, self.settings.dtype)
        whole = len(vectors) // (channels * crops) * channels * crops  # a batch may end within a window's crops
        self._vectors = bytearray(vectors[whole:].tobytes())
        taken = vectors[:whole]
        return taken.reshape(-1, channels) if crops == 1 else taken.reshape(-1, crops, channels)

    def _finish_frames(self) -> int:
        """Take what is left of the frames; returns how many frames all streams have."""
        # Flow has one frame fewer than RGB, and both are to have equal windows.
        num_frames = self.num_pushed + (self.stream == "flow")
        length = count_frames(self.settings, num_frames)
        ends_in_zeros = self.stream == "flow" and self.settings.flow_end == "zero"
        if self.windows.count(length) == 0 or (self._newest is None and not ends_in_zeros):
            raise VideoError("too_short", self._explain(num_frames))
        last, self._newest = self._newest, None
        while last is not None and self._num_taken < length - ends_in_zeros:  # once, not at all, or twice
            self._take(last)
        return length

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of a frame that is kept."""
        size = self.network.input_spec.size
        return self.settings.crops, size, size, CHANNELS[self.stream]

    def _explain(self, num_frames: int) -> str:
        if num_frames == 1 and self.windows.count(1):
            return "it has one frame, and so no flow"
        return f"it has {num_frames:,} frames, and a window spans {self.windows.span:,}"

    def _take(self, frame: npt.NDArray[Any]) -> None:
        """Keep a frame if a window needs it, and complete the windows that end with it."""
        index, self._num_taken = self._num_taken, self._num_taken + 1
        if index < self.windows.first(self._place):
            return
        self._frames[index] = self._prepare(frame)
        while self.windows.stop(self._place) <= self._num_taken:
            self._show(self.windows.frames(self._place, self._num_taken))
            self._place += 1
            first = self.windows.first(self._place)
            self._frames = {at: kept for at, kept in self._frames.items() if at >= first}

    def _prepare(self, frame: npt.NDArray[Any]) -> Tensor:
        """(crops, size, size, C) on the device: RGB or codes as integers; flow that had to be resized in pixels."""
        frame = self._resize(frame if self._codes is None else split_components(frame))
        cropped = crop_frame(frame, self.network.input_spec.size, self.settings.crops, self._scale)
        # PyTorch computes nothing with uint16, and codes have no more than 10 bits.
        cropped = cropped.astype(np.int16) if cropped.dtype == np.uint16 else np.ascontiguousarray(cropped)
        return torch.from_numpy(cropped).to(self.device)

    def _resize(self, frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The frame (H, W, C) at the size that crops are taken from."""
        spec, clips, size = self.network.input_spec, self.network.clips, self.settings.frame_size
        height, width = shape = frame.shape[:2]
        if size is not None:
            same = min(shape) if isinstance(size, int) else (width, height)
            if same == size:
                return frame
            wanted = output_size(height, width, size) if isinstance(size, int) else size[::-1]
            return resize_frames(self._in_pixels(frame)[None], wanted)[0]
        if not needs_resize(height, width, spec, clips):
            return frame
        return resize_for_crop(self._in_pixels(frame)[None], spec, clips)[0]

    def _in_pixels(self, frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Flow that is resized: its vectors are scaled along, which codes cannot be."""
        if self._codes is None:
            return frame
        self._scale = None
        return dequantise(frame, self._codes)

    def _show(self, frames: npt.NDArray[np.int64]) -> None:
        """Put a window in the queue: its clips, and which of their frames are zero."""
        missing = torch.tensor([index not in self._frames for index in frames.tolist()], device=self.device)
        kept = [self._frames.get(index) for index in frames.tolist()]
        seen = next((frame for frame in kept if frame is not None), None)
        blank = torch.zeros(self._shape, device=self.device) if seen is None else torch.zeros_like(seen)
        clips = torch.stack([blank if frame is None else frame for frame in kept], dim=1)
        self._clips.append(clips)
        self._missing.append(missing.expand(len(clips), -1))
        self._compute(least=self.batch)

    @torch.inference_mode()
    def _compute(self, least: int) -> None:
        """Empty the queue of clips by whole batches where it holds at least so many."""
        if sum(map(len, self._clips)) < least:
            return
        clips, missing = torch.cat(self._clips), torch.cat(self._missing)
        done = len(clips) // least * least
        for part, zero in zip(clips[:done].split(self.batch), missing[:done].split(self.batch), strict=True):
            scaled = scale_clips(self.stream, part, self.network.clips.bound, self._scale)
            if zero.any():
                scaled.masked_fill_(zero[:, None, :, None, None], 0)
            self._vectors += self._show_to_network(scaled).tobytes()
        self._clips, self._missing = [clips[done:]], [missing[done:]]

    def _show_to_network(self, clips: Tensor) -> npt.NDArray[np.floating]:
        """(clips, channels) in the settings' dtype. Raises RunError where the network fails: no fault of the video."""
        try:
            vectors = self.network.model.pooled_features(clips).float().cpu().numpy()
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise  # whoever holds the device knows what to do
        except RuntimeError as error:  # as cuDNN's, and that of a machine without memory
            raise RunError(f"the network of --{self.stream} failed on {self.device}: {error}") from error
        with np.errstate(over="ignore"):
            written = vectors.astype(self.settings.dtype)
        if not np.isfinite(written).all():
            raise RunError(
                f"the network of --{self.stream} gives NaN or infinity: if its weights are finite, take --precision "
                "fp32 and --dtype float32 with another --output"
            )
        return written
