"""Two-Stream: two 2-D Inception-V1, one on an RGB frame and one on ten flow frames (paper, section 2.3).

The streams are trained apart and their logits summed; both in one model serve evaluation and the parameter count.
A clip of several snapshots averages the logits over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.convolution import Classifier
from models.inception import InceptionV1, UnitFactory
from models.input_spec import CHANNELS, STREAMS, ClipSampling, InputSpec, ModelConfig, Stream, StreamSampling
from models.video_model import Clips, VideoModel, stream_of

FLOW_FRAMES = 10  # stacked as the channels of one snapshot


@dataclass(frozen=True, kw_only=True)
class TwoStreamConfig(ModelConfig):
    """Two-Stream; `stream` restricts it to one of the two, which is how each is trained."""

    stream: Stream | None = None
    test_snapshots: int = 25  # × 10 flow frames: the 250 of Table 1
    bn_gamma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream not in (None, *STREAMS):
            raise ValueError(f"stream is {self.stream!r}; choose 'rgb', 'flow', or None for both.")

    @property
    def streams(self) -> tuple[Stream, ...]:
        return STREAMS if self.stream is None else (self.stream,)


class SnapshotNet(nn.Module):
    """2-D Inception-V1 with a classifier: (B, C, N, H, W), N snapshots, to their mean logits (B, num_classes)."""

    def __init__(self, in_channels: int, config: TwoStreamConfig) -> None:
        super().__init__()
        unit = UnitFactory(width=config.width, bn_momentum=config.bn_momentum, bn_gamma=config.bn_gamma)
        self.trunk = InceptionV1(in_channels, unit=unit)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = Classifier(self.trunk.out_channels, config.num_classes)

    def forward(self, snapshots: Tensor) -> Tensor:
        features = self.trunk(snapshots).to(self.logits.weight.dtype).mean(dim=(3, 4), keepdim=True)  # (B, C, N, 1, 1)
        # Over the snapshots; height and width are 1 by now.
        return self.logits(self.dropout(features)).mean(dim=(2, 3, 4))


class TwoStream(VideoModel):
    """N RGB frames (B, 3, N, H, W) and 10 N flow frames (B, 2, 10 N, H, W) to summed logits (B, num_classes)."""

    config: TwoStreamConfig

    def __init__(self, config: TwoStreamConfig) -> None:
        super().__init__()
        self.config = config
        self.streams = nn.ModuleDict({s: SnapshotNet(SNAPSHOT_CHANNELS[s], config) for s in config.streams})

    @property
    def input_spec(self) -> InputSpec:
        """Table 1: one RGB and 10 flow frames (0.4 s) for training; 25 and 250 (10 s) at test, snapshots averaged."""
        train = snapshot_sampling(self.config.streams, 1)
        test = snapshot_sampling(self.config.streams, 1, num_clips=self.config.test_snapshots)
        return InputSpec(size=self.config.size, train=train, test=test)

    def forward(self, clips: Clips) -> Tensor:
        snapshots = snapshots_of(clips, self.streams)
        return torch.stack([net(snapshots[stream]) for stream, net in self.streams.items()]).sum(dim=0)


SNAPSHOT_CHANNELS = {"rgb": CHANNELS["rgb"], "flow": CHANNELS["flow"] * FLOW_FRAMES}


def snapshot_sampling(streams: Sequence[Stream], snapshots: int, *, num_clips: int = 1) -> ClipSampling:
    """Clips of `snapshots` times ten frames: of each ten the first RGB frame and all flow frames."""
    rgb = StreamSampling(channels=CHANNELS["rgb"], num_frames=snapshots, frame_step=FLOW_FRAMES)
    flow = StreamSampling(channels=CHANNELS["flow"], num_frames=snapshots * FLOW_FRAMES)
    samplings = {"rgb": rgb, "flow": flow}
    chosen: dict[str, StreamSampling] = {stream: samplings[stream] for stream in streams}
    return ClipSampling(span=snapshots * FLOW_FRAMES, streams=chosen, num_clips=num_clips)


def snapshots_of(clips: Clips, streams: Iterable[str]) -> dict[str, Tensor]:
    """Each stream's snapshots: (B, 3, N, H, W), and for flow (B, 20, N, H, W): u and v of each ten frames in turn.

    Raises ValueError where flow does not divide into stacks of ten, or the streams have different numbers of them.
    """
    snapshots = {stream: stream_of(clips, stream) for stream in streams}
    if "flow" in snapshots:
        snapshots["flow"] = stack_flow(snapshots["flow"])
    counts = {stream: snapshot.shape[2] for stream, snapshot in snapshots.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"The streams have different numbers of snapshots, {counts}; each RGB frame needs ten of flow."
        )
    return snapshots


def stack_flow(flow: Tensor) -> Tensor:
    """Flow frames (B, 2, 10 N, H, W) as (B, 20, N, H, W): the channels of a stack are u, v, u, v, … in time order."""
    if flow.shape[2] % FLOW_FRAMES:
        raise ValueError(f"A flow clip of {flow.shape[2]} frames does not divide into stacks of {FLOW_FRAMES}.")
    stacks = flow.unflatten(2, (-1, FLOW_FRAMES))  # (B, 2, N, 10, H, W)
    # (B, 10, 2, N, H, W): with the frames in front u and v of each stay neighbours.
    return stacks.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
