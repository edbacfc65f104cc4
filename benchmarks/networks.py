"""How fast a model trains and infers on a CPU, against plain NCDHW builds of the same network in the same run.

    python benchmarks/networks.py                                  # I3D, two clips of 16×112×112, one thread
    python benchmarks/networks.py --batch 1 --frames 64 --size 224
    python benchmarks/networks.py --table                          # parameters, inputs and GFLOPs of the five models

Two plain builds share the weights: `padding` copies a zero-padded input before every layer, as the usual PyTorch ports
do, and is what ratios refer to; `symmetric` lets PyTorch pad where it can. Steps of all builds take turns, and the
smallest process CPU time of each counts. For GPUs there is benchmarks/gpu_networks.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

import models
from models.convolution import ConvUnit, MaxPool, pad_for_convolution, same_padding
from models.cost import blank_clips, count_flops, count_parameters
from models.folding import fold_batch_norm
from models.video_model import VideoModel

PAPER_PARAMETERS = {"convnet_lstm": "9M", "c3d": "79M", "two_stream": "12M", "fused_two_stream": "39M", "i3d": "25M"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. `frames` applies to I3D; the other models take their own clips at `size`."""

    model: str = "i3d"
    batch: int = 2
    frames: int = 16
    size: int = 112
    rounds: int = 6
    threads: int = 1
    table: bool = False


class PlainUnit(nn.Module):
    """Convolution, batch norm and ReLU in NCDHW; `copies` pads every input beforehand."""

    def __init__(self, unit: ConvUnit, *, copies: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.copies = copy.deepcopy(unit.conv), copy.deepcopy(unit.bn), copies
        self.conv.weight.data = self.conv.weight.data.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x, kernel, stride = x.contiguous(), self.conv.kernel, self.conv.stride
        x, padding = (_padded(x, kernel, stride), (0, 0, 0)) if self.copies else pad_for_convolution(x, kernel, stride)
        return nn.functional.relu(self.bn(nn.functional.conv3d(x, self.conv.weight, None, stride, padding)))


class PlainPool(nn.Module):
    """Max-pool in NCDHW; `copies` pads every input beforehand."""

    def __init__(self, pool: MaxPool, *, copies: bool) -> None:
        super().__init__()
        self.pool, self.copies = pool, copies

    def forward(self, x: Tensor) -> Tensor:
        if not self.copies:
            return self.pool(x.contiguous())
        x = _padded(x.contiguous(), self.pool.kernel, self.pool.stride)
        return nn.functional.max_pool3d(x, self.pool.kernel, self.pool.stride)


def _padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return nn.functional.pad(x, [n for pad in reversed(pads) for n in pad])


def plain_build(module: nn.Module, *, copies: bool) -> nn.Module:
    """A copy of a model with every unit and pool replaced by its plain form."""
    return _replace_units(copy.deepcopy(module), copies=copies)


def _replace_units(module: nn.Module, *, copies: bool) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, ConvUnit):
            setattr(module, name, PlainUnit(child, copies=copies))
        elif isinstance(child, MaxPool):
            setattr(module, name, PlainPool(child, copies=copies))
        else:
            _replace_units(child, copies=copies)
    return module


def build(settings: Settings) -> VideoModel:
    size, frames = settings.size, settings.frames
    if settings.model == "i3d":
        return models.build("i3d", num_classes=400, size=size, frames=frames, test_frames=frames, dropout=0.0)
    return models.build(settings.model, num_classes=400, size=size, dropout=0.0)


def with_running_statistics(model: VideoModel) -> VideoModel:
    """The model with statistics and offsets that keep activations alive, so that parity is that of logits of a few."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.3, 0.6)
            nn.init.uniform_(module.bias, -0.2, 0.4)
    return model


def training_step(model: nn.Module, clips: dict[str, Tensor], *, bf16: bool) -> Callable[[], None]:
    """Forward, loss, backward and SGD with momentum."""
    labels = torch.zeros(len(next(iter(clips.values()))), dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = models.cross_entropies(model(clips), labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, clips: dict[str, Tensor], *, bf16: bool = False) -> Callable[[], Tensor]:
    def infer() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return model(clips)

    return infer


def take_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The smallest processor time of each step in seconds, after one round that does not count."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            elapsed = time.process_time() - start
            best[name] = min(best[name], elapsed) if turn else best[name]
    return best


def report(title: str, times: dict[str, float]) -> None:
    print(f"\n{title}\n{'':34}{'seconds':>9}{'× padding fp32':>16}")
    for name, seconds in times.items():
        print(f"{name:34}{seconds:9.3f}{times['plain, padding, fp32'] / seconds:15.2f}×")


def measure(settings: Settings) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    model = build(settings)
    zeros = blank_clips(model.input_spec.train, settings.size, batch=settings.batch)
    clips = {stream: torch.rand_like(clip) * 2 - 1 for stream, clip in zeros.items()}
    padding, symmetric = plain_build(model, copies=True), plain_build(model, copies=False)
    training = {
        "plain, padding, fp32": training_step(padding, clips, bf16=False),
        "plain, symmetric, fp32": training_step(symmetric, clips, bf16=False),
        "ours, fp32": training_step(model, clips, bf16=False),
        "plain, padding, bf16 autocast": training_step(padding, clips, bf16=True),
        "ours, bf16 autocast": training_step(model, clips, bf16=True),
    }
    shape = ", ".join(f"{stream} {tuple(clip.shape)}" for stream, clip in clips.items())
    print(f"{settings.model}, {shape}, {settings.threads} thread(s), torch {torch.__version__}")
    report("training step", take_turns(training, settings.rounds))
    model = with_running_statistics(build(settings)).eval()
    padding, symmetric = plain_build(model, copies=True), plain_build(model, copies=False)
    inferring = {
        "plain, padding, fp32": inference(padding, clips),
        "plain, symmetric, fp32": inference(symmetric, clips),
        "ours, fp32": inference(model, clips),
        "ours, folded, fp32": inference(fold_batch_norm(model), clips),
        "plain, padding, bf16 autocast": inference(padding, clips, bf16=True),
        "ours, folded, bf16": inference(fold_batch_norm(model, dtype=torch.bfloat16), clips),
    }
    report("inference", take_turns(inferring, settings.rounds))
    report_parity({name: infer() for name, infer in inferring.items()})


def report_parity(logits: dict[str, Tensor]) -> None:
    exact = logits["plain, padding, fp32"].float()
    print(f"\nlogits up to {exact.abs().max():.3g}; greatest difference to plain, padding, fp32:")
    for name, values in logits.items():
        print(f"{name:34}{(values.float() - exact).abs().max():9.1e}")


def print_table() -> None:
    """The five models at paper size, in Markdown."""
    print("| model | parameters | paper | train input | test input | GFLOPs, train clip | GFLOPs, test video |")
    print("|---|---:|---:|---|---|---:|---:|")
    for name in models.CONFIGS:
        streams = ("rgb", "flow") if name == "i3d" else (None,)
        configs = [models.configure(name, num_classes=400, stream=stream) for stream in streams]
        with torch.device("meta"):
            built = [models.build_from(config) for config in configs]
        parameters = sum(count_parameters(model) for model in built) / 1e6
        train, test = (sum(count_flops(config, test=test) for config in configs) / 1e9 for test in (False, True))
        cells = [
            f"{parameters:.2f} M",
            PAPER_PARAMETERS[name],
            *(describe_inputs(built, test=t) for t in (False, True)),
        ]
        print(f"| `{name}` | " + " | ".join(cells) + f" | {train:.0f} | {test:.0f} |")


def describe_inputs(built: list[VideoModel], *, test: bool) -> str:
    samplings = [model.input_spec.test if test else model.input_spec.train for model in built]
    frames = {s: c.num_frames * sampling.num_clips for sampling in samplings for s, c in sampling.streams.items()}
    size = built[0].input_spec.size
    named = " + ".join(f"{count} {stream.upper() if stream == 'rgb' else stream}" for stream, count in frames.items())
    return f"{named}, {size}×{size}, {samplings[0].seconds:g} s"


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    print_table() if chosen.table else measure(chosen)
