"""I3D: Inception-V1 inflated to three dimensions, one stream (Carreira & Zisserman 2017, section 2.4, Figure 3).

The two streams are two models, trained apart; their logits are summed with equal weight at test time.
Temporal kernels, strides and the inflation of pools are settings, so that a search can vary them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from models.convolution import Classifier
from models.inception import InceptionV1, TemporalExtents, UnitFactory, count_time_steps
from models.input_spec import CHANNELS, InputSpec, ModelConfig, Stream, consecutive_frames
from models.video_model import Clips, VideoModel, stream_of


@dataclass(frozen=True, kw_only=True)
class I3DConfig(TemporalExtents, ModelConfig):
    """One stream of I3D. The defaults are the paper's; `frames=16, size=64, width=0.25` trains on a CPU.

    One of every `frame_step` frames is kept; `frames` and `test_frames` count the kept ones. `logits_pool` is the
    temporal kernel of the average pool (stride 1, no padding) before the classifier.
    """

    stream: Stream = "rgb"
    frames: int = 64
    test_frames: int = 250
    frame_step: int = 1
    logits_pool: int = 2
    bn_gamma: bool = False

    def __post_init__(self) -> None:
        # Both by name: super() would reach the first base's checks only.
        ModelConfig.__post_init__(self)
        TemporalExtents.__post_init__(self)
        if self.stream not in CHANNELS:
            raise ValueError(f"stream is {self.stream!r}; I3D has one stream, 'rgb' or 'flow'.")
        # Too short a clip is refused here, before any worker starts, and not at the first batch.
        time_steps(self, self.frames)
        time_steps(self, self.test_frames)


def time_steps(config: I3DConfig, frames: int) -> dict[str, int]:
    """Time steps after each layer, end point name to number, for a clip of `frames`.

    Computed from the settings alone, before any tensor. Raises ValueError naming the first layer that is left none.
    """
    steps = count_time_steps(config.strides(), frames)
    steps["Logits"] = steps["Mixed_5c"] - config.logits_pool + 1
    if steps["Logits"] < 1:
        raise ValueError(
            f"Logits leaves no time steps: {steps['Mixed_5c']} of the clip's {frames} reach its average pool, whose "
            f"temporal kernel is {config.logits_pool}. Use longer clips, smaller strides or a smaller logits_pool."
        )
    return steps


class I3D(VideoModel):
    """One stream of I3D: (B, 3 or 2, T, H, W) in [-1, 1] to (B, num_classes) logits."""

    config: I3DConfig

    def __init__(self, config: I3DConfig) -> None:
        super().__init__()
        self.config = config
        unit = UnitFactory(width=config.width, bn_momentum=config.bn_momentum, bn_gamma=config.bn_gamma)
        self.trunk = InceptionV1(CHANNELS[config.stream], unit=unit, temporal=config)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = Classifier(self.trunk.out_channels, config.num_classes)

    @property
    def input_spec(self) -> InputSpec:
        """Table 1: 64 frames (2.56 s) for training, up to 250 frames (10 s) at test, the whole video in one pass."""
        stream, step = self.config.stream, self.config.frame_step
        train = consecutive_frames(stream, self.config.frames, frame_step=step)
        test = consecutive_frames(stream, self.config.test_frames, frame_step=step, any_length=True)
        return InputSpec(size=self.config.size, train=train, test=test)

    def features(self, clips: Clips, endpoint: str = "Mixed_5c") -> Tensor:
        """The activation (B, C, T', H', W') at an end point of Inception, Conv3d_1a_7x7 to Mixed_5c."""
        return self.trunk(stream_of(clips, self.config.stream), endpoint)

    def check_frames(self, frames: int) -> None:
        """ValueError, which names the layer, where clips of so many frames are too short."""
        time_steps(self.config, frames)

    def pooled_features(self, clips: Clips) -> Tensor:
        """The clip's feature vector (B, 1024 × width): Mixed_5c averaged as before the classifier."""
        return self._pool(clips).mean(dim=2)[:, :, 0, 0]

    def forward(self, clips: Clips) -> Tensor:
        scores = self.logits(self.dropout(self._pool(clips)))  # (B, classes, 7, 1, 1) of 64 frames
        # Over time logits are averaged, as in DeepMind's release.
        return scores.mean(dim=2)[:, :, 0, 0]

    def _pool(self, clips: Clips) -> Tensor:
        """(B, C, T'-1, 1, 1): the 2×7×7 average pool of a 7×7 grid; other sizes average their whole grid alike."""
        clip = stream_of(clips, self.config.stream)
        time_steps(self.config, clip.shape[2])
        # (B, 1024, 8, 1, 1) of 64 frames; summed in fp32 also where the trunk computes in bf16.
        grid = self.trunk(clip).to(self.logits.weight.dtype).mean(dim=(3, 4), keepdim=True)
        return nn.functional.avg_pool3d(grid, (self.config.logits_pool, 1, 1), stride=1)
