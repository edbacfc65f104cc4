"""ConvNet+LSTM: Inception-V1 on each frame, an LSTM with batch norm over the frames (paper, section 2.1).

The loss is taken at every time step; at test time the last step's output counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.convolution import without_autocast
from models.inception import InceptionV1, UnitFactory
from models.input_spec import CHANNELS, InputSpec, ModelConfig, Stream, consecutive_frames
from models.video_model import Clips, VideoModel, stream_of


@dataclass(frozen=True, kw_only=True)
class ConvNetLSTMConfig(ModelConfig):
    """ConvNet+LSTM. One of every `frame_step` frames is kept; `frames` and `test_frames` count the kept ones."""

    stream: Stream = "rgb"
    frames: int = 25
    test_frames: int = 50
    frame_step: int = 5
    hidden: int = 512
    bn_gamma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream not in CHANNELS:
            raise ValueError(f"stream is {self.stream!r}; ConvNet+LSTM has one stream, 'rgb' or 'flow'.")


class LSTM(nn.Module):
    """One-layer LSTM with a single bias (4 × hidden) and the forget gate's bias starting at 1, as TensorFlow's.

    (B, T, in) to the hidden states (B, T, hidden). Gates are stored in PyTorch's order: input, forget, cell, output.
    """

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(in_features, 4 * hidden)
        self.from_hidden = nn.Linear(hidden, 4 * hidden, bias=False)
        for linear in (self.from_input, self.from_hidden):
            nn.init.uniform_(linear.weight, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        nn.init.zeros_(self.from_input.bias)
        # At 0 the gate would halve the cell at each step (sigmoid(0) = 0.5): nothing of 25 steps ago would be left.
        nn.init.ones_(self.from_input.bias[hidden : 2 * hidden])

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(len(x), self.hidden)
        states = []
        # One product for the input of all steps; only what depends on the state has to wait for the step before.
        for gates in self.from_input(x).unbind(dim=1):
            i, f, g, o = (gates + self.from_hidden(state)).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states, dim=1)


class ConvNetLSTM(VideoModel):
    """(B, 3, T, H, W) in [-1, 1] to the logits at every time step (B, T, num_classes)."""

    config: ConvNetLSTMConfig

    def __init__(self, config: ConvNetLSTMConfig) -> None:
        super().__init__()
        self.config = config
        unit = UnitFactory(width=config.width, bn_momentum=config.bn_momentum, bn_gamma=config.bn_gamma)
        hidden = unit.channels(config.hidden)
        self.trunk = InceptionV1(CHANNELS[config.stream], unit=unit)
        self.lstm = LSTM(self.trunk.out_channels, hidden)
        # TensorFlow's ε, as in the trunk; PyTorch's would be 1e-5.
        self.bn = nn.BatchNorm1d(hidden, eps=1e-3, momentum=config.bn_momentum)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(hidden, config.num_classes)

    @property
    def input_spec(self) -> InputSpec:
        """Table 1: 25 RGB frames, every fifth of 5 s, for training; 50 of 10 s at test."""
        stream, step = self.config.stream, self.config.frame_step
        train = consecutive_frames(stream, self.config.frames, frame_step=step)
        # Any length: an LSTM takes as many steps as there are, so a shorter video need not be looped.
        test = consecutive_frames(stream, self.config.test_frames, frame_step=step, any_length=True)
        return InputSpec(size=self.config.size, train=train, test=test, scores_every_step=True)

    def forward(self, clips: Clips) -> Tensor:
        grid = self.trunk(stream_of(clips, self.config.stream))  # (B, 1024, T, 7, 7)
        frames = grid.to(self.logits.weight.dtype).mean(dim=(3, 4)).transpose(1, 2)  # (B, T, 1024)
        # Like every classifier here in its weights' dtype: in bfloat16 the logits of some videos would tie.
        with without_autocast(frames.device):
            states = self.bn(self.lstm(frames).transpose(1, 2)).transpose(1, 2)  # BatchNorm1d takes (B, C, T)
            return self.logits(self.dropout(states))
