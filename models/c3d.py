"""3D-ConvNet: C3D with batch norm after every convolution and hidden layer (Tran et al. 2015; paper, section 2.2).

It differs from C3D in the batch norm and in the first pool's temporal stride of 2. SAME padding everywhere: 112 pixels
leave a 4×4 grid, which the paper's 79 M parameters imply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from models.convolution import Classifier, MaxPool
from models.inception import UnitFactory
from models.input_spec import CHANNELS, InputSpec, ModelConfig, Stream, consecutive_frames
from models.video_model import Clips, VideoModel, stream_of

# Output channels of the convolutions before each of the five pools, and of the two hidden layers.
STAGE_WIDTHS = {"1": (64,), "2": (128,), "3": (256, 256), "4": (512, 512), "5": (512, 512)}
HIDDEN_WIDTHS = {"fc6": 4096, "fc7": 4096}


@dataclass(frozen=True, kw_only=True)
class C3DConfig(ModelConfig):
    """C3D on clips of `frames` frames; `test_clips` of them, one after the other, are averaged at test time."""

    stream: Stream = "rgb"
    size: int = 112
    frames: int = 16
    test_clips: int = 15  # × 16 frames: the 240 of Table 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream not in CHANNELS:
            raise ValueError(f"stream is {self.stream!r}; C3D has one stream, 'rgb' or 'flow'.")


class C3D(VideoModel):
    """(B, 3, frames, size, size) in [-1, 1] to (B, num_classes) logits; only this clip size fits its hidden layers."""

    config: C3DConfig

    def __init__(self, config: C3DConfig) -> None:
        super().__init__()
        self.config = config
        unit = UnitFactory(width=config.width, bn_momentum=config.bn_momentum, bn_gamma=True)
        self.trunk = nn.Sequential()
        channels = CHANNELS[config.stream]
        for stage, widths in STAGE_WIDTHS.items():
            # Not strict: a stage of one convolution has the letter a alone.
            for letter, width in zip("ab", widths, strict=False):
                self.trunk.add_module(f"conv{stage}{letter}", unit(channels, unit.channels(width), (3, 3, 3)))
                channels = unit.channels(width)
            # Time too in the first pool, where C3D leaves it alone: 16 frames become 8, 4, 2, 1, 1.
            self.trunk.add_module(f"pool{stage}", MaxPool((2, 2, 2), (2, 2, 2)))
        # Five pools of stride 2, each rounding up: 512 × 1 × 4 × 4 of a clip of 16×112×112.
        features = channels * math.ceil(config.frames / 32) * math.ceil(config.size / 32) ** 2
        # As 1×1×1 convolutions, so that folding and the forms for CUDA find the unit that they know.
        self.hidden = nn.Sequential()
        for name, width in HIDDEN_WIDTHS.items():
            self.hidden.add_module(name, unit(features, unit.channels(width), (1, 1, 1)))
            self.hidden.add_module(f"dropout_{name}", nn.Dropout(config.dropout))
            features = unit.channels(width)
        self.logits = Classifier(features, config.num_classes)

    @property
    def input_spec(self) -> InputSpec:
        """Table 1: 16 RGB frames (0.64 s) for training; 240 frames (9.6 s) in 15 clips at test."""
        train = consecutive_frames(self.config.stream, self.config.frames)
        test = consecutive_frames(self.config.stream, self.config.frames, num_clips=self.config.test_clips)
        return InputSpec(size=self.config.size, train=train, test=test)

    def forward(self, clips: Clips) -> Tensor:
        clip = stream_of(clips, self.config.stream)
        expected = (self.config.frames, self.config.size, self.config.size)
        if tuple(clip.shape[2:]) != expected:
            raise ValueError(
                f"This C3D takes clips of {expected} frames, rows and columns; got {tuple(clip.shape[2:])}."
            )
        grid = self.trunk(clip).flatten(1)  # (B, 8192) at 16×112×112
        return self.logits(self.hidden(grid[:, :, None, None, None])).flatten(1)
