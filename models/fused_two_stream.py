"""3D-Fused Two-Stream: two framewise Inception-V1 joined by a 3×3×3 convolution (paper, section 2.3).

Five snapshots, ten frames apart, each one RGB and ten flow frames. The streams' last grids are concatenated (only this
gives the paper's 39 M parameters), convolved to 512 channels, max-pooled and averaged to one vector. The stride of the
pool (2) is not stated in the paper. Trained end to end; the new layers start from Gaussian noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.convolution import BatchNorm, Classifier, Convolution, ConvUnit, MaxPool
from models.inception import InceptionV1, UnitFactory
from models.input_spec import STREAMS, InputSpec, ModelConfig
from models.two_stream import SNAPSHOT_CHANNELS, snapshot_sampling, snapshots_of
from models.video_model import Clips, VideoModel


@dataclass(frozen=True, kw_only=True)
class FusedTwoStreamConfig(ModelConfig):
    """3D-Fused Two-Stream on clips of `snapshots` snapshots; `test_clips` clips are averaged at test time."""

    snapshots: int = 5
    test_clips: int = 5
    fusion_channels: int = 512
    bn_gamma: bool = False


class FusedTwoStream(VideoModel):
    """N RGB frames (B, 3, N, H, W) and 10 N flow frames (B, 2, 10 N, H, W) to (B, num_classes) logits."""

    config: FusedTwoStreamConfig

    def __init__(self, config: FusedTwoStreamConfig) -> None:
        super().__init__()
        self.config = config
        unit = UnitFactory(width=config.width, bn_momentum=config.bn_momentum, bn_gamma=config.bn_gamma)
        trunks: dict[str, InceptionV1] = {
            stream: InceptionV1(SNAPSHOT_CHANNELS[stream], unit=unit) for stream in STREAMS
        }
        self.streams = nn.ModuleDict(trunks)
        channels = unit.channels(config.fusion_channels)
        grids = sum(trunk.out_channels for trunk in trunks.values())
        norm = BatchNorm(channels, momentum=config.bn_momentum, gamma=True)
        self.fusion = ConvUnit(Convolution(grids, channels, (3, 3, 3)), norm)
        self.pool = MaxPool((3, 3, 3), (2, 2, 2))
        self.dropout = nn.Dropout(config.dropout)
        self.logits = Classifier(channels, config.num_classes)

    @property
    def input_spec(self) -> InputSpec:
        """Table 1: 5 RGB and 50 flow frames (2 s) for training; 25 and 250 (10 s) at test, five clips averaged."""
        train = snapshot_sampling(STREAMS, self.config.snapshots)
        test = snapshot_sampling(STREAMS, self.config.snapshots, num_clips=self.config.test_clips)
        return InputSpec(size=self.config.size, train=train, test=test)

    def forward(self, clips: Clips) -> Tensor:
        snapshots = snapshots_of(clips, self.streams)
        # (B, 2048, N, 7, 7). Added up in place of joined, the streams would leave 25.6 M parameters, not 39 M.
        grids = torch.cat([trunk(snapshots[stream]) for stream, trunk in self.streams.items()], dim=1)
        # (B, 512, 1, 1, 1): a classifier on the whole grid would bring the parameters to 89.7 M.
        pooled = self.pool(self.fusion(grids)).to(self.logits.weight.dtype).mean(dim=(2, 3, 4), keepdim=True)
        return self.logits(self.dropout(pooled)).flatten(1)
