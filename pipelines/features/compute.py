"""I3D's vectors of a video's windows, from frames that come one by one.

Of a video only the frames of windows that are not yet complete are kept, cropped and as bytes, so frames cost bounded
memory whatever its length, and each is decoded and its flow computed once however many windows it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.input_spec import Stream
from pipelines.features.settings import FeatureSettings, FrameSize
from pipelines.features.windows import Windows
from pipelines.media.codec import FlowScale
from pipelines.training.weights_files import Which


class FeatureNetworks:
    """The networks of a worker, one for each stream, folded and on their device; kept from video to video.

    settings   as given, `streams` resolved
    windows    the same for all streams
    hashes     SHA-256 of each network's tensors, by stream
    """

    settings: FeatureSettings
    windows: Windows
    hashes: dict[Stream, str]

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
        raise NotImplementedError

    @property
    def streams(self) -> tuple[Stream, ...]:
        """RGB before flow."""
        raise NotImplementedError

    @property
    def frame_size(self) -> FrameSize:
        """Size to decode at: what the settings say, else what the networks were trained on."""
        raise NotImplementedError

    @property
    def flow_bound(self) -> float:
        """Pixels that flow must be clipped to, or more: the flow network's bound; 20 without one."""
        raise NotImplementedError

    def open(self, stream: Stream, scale: FlowScale | None = None) -> StreamFeatures:
        """The features of one video's stream. `scale` is that of the flow's codes."""
        raise NotImplementedError


class StreamFeatures:
    """The features of one stream of one video, whose frames are pushed one by one."""

    def push(self, frame: npt.NDArray[Any]) -> None:
        """The next frame: (H, W, 3) uint8 RGB, or (2H, W) codes of flow, u over v, as the encoder takes them.

        Raises VideoError("bad_shape") where the crop does not fit in the frame.
        """
        raise NotImplementedError

    def finish(self) -> npt.NDArray[np.floating]:
        """(windows, channels), or (windows, crops, channels) of more than one crop; in the settings' dtype.

        Raises VideoError("too_short") where the video has no window: no frames for one, or one frame and so no flow.
        """
        raise NotImplementedError
