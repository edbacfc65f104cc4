"""How fast the networks train and infer on a GPU, against a plain port of I3D in the same run.

    python benchmarks/gpu_networks.py                          # I3D, RGB 16×64×224×224, each part for a minute or so
    python benchmarks/gpu_networks.py --parts training profile --seconds 120
    python benchmarks/gpu_networks.py --small                  # on a CPU, in seconds: that nothing is misspelt

The plain port is built as the popular ones are: every input padded beforehand, conv3d for 1×1×1 too, NCDHW unless said.
Variants take turns and the median of each counts. One that fails gives a row that says why; once a part's seconds are
up no further variant of it is begun. Each function returns rows, for other benchmarks to join. With --json the last
line is the ratios and all rows. Recorded: launched as CUDA graphs, as jobs/train.py does on one GPU.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor, nn

import models
from models import cuda
from models.convolution import Convolution, ConvUnit, MaxPool, same_padding
from models.cost import blank_clips, count_flops
from models.folding import fold_batch_norm
from models.video_model import VideoModel

Part = Literal["training", "inference", "conv1", "pools", "networks", "profile"]
PARTS: tuple[Part, ...] = ("training", "inference", "conv1", "pools", "networks", "profile")
PORT = "port, bf16, channels_last_3d, cudnn.benchmark"  # the best that the popular port does
TRAINED, INFERRED = "ours, bf16", "ours, folded, bf16"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. `seconds` bounds each part; `small` makes clips, network and rounds small, for a CPU."""

    parts: tuple[Part, ...] = PARTS
    batch: int = 16
    frames: int = 64
    size: int = 224
    rounds: int = 7
    seconds: float = 90.0
    compile: bool = False
    small: bool = False
    json: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.small else "cuda")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant: median milliseconds of a call, clips a second, TFLOP/s, memory at its peak, or why there is none."""

    part: str
    name: str
    milliseconds: float | None = None
    clips_per_s: float | None = None
    tflops: float | None = None
    gib: float | None = None
    error: str = ""


class PortUnit(nn.Module):
    """Convolution on an input that is padded beforehand, batch norm and ReLU."""

    def __init__(self, unit: ConvUnit) -> None:
        super().__init__()
        self.conv, self.bn = copy.deepcopy(unit.conv), copy.deepcopy(unit.bn)

    def forward(self, x: Tensor) -> Tensor:
        x = _padded(x, self.conv.kernel, self.conv.stride)
        return nn.functional.relu(self.bn(nn.functional.conv3d(x, self.conv.weight, None, self.conv.stride)))


class PortPool(nn.Module):
    """Max-pool of an input that is padded beforehand."""

    def __init__(self, pool: MaxPool) -> None:
        super().__init__()
        self.kernel, self.stride = pool.kernel, pool.stride

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool3d(_padded(x, self.kernel, self.stride), self.kernel, self.stride)


class Port(nn.Module):
    """I3D as the popular ports build it, with the weights of ours."""

    def __init__(self, model: VideoModel, memory_format: torch.memory_format) -> None:
        super().__init__()
        ported = _port_layers(copy.deepcopy(model))
        self.layers = nn.Sequential(*ported.get_submodule("trunk").children())
        self.logits, self.memory_format = ported.get_submodule("logits"), memory_format

    def forward(self, clips: Mapping[str, Tensor]) -> Tensor:
        grid = self.layers(clips["rgb"].contiguous(memory_format=self.memory_format))
        logits: Tensor = self.logits(grid.mean(dim=(2, 3, 4), keepdim=True))
        return logits.flatten(1)


def _padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return nn.functional.pad(x, [n for pad in reversed(pads) for n in pad])


def _port_layers(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, ConvUnit):
            setattr(module, name, PortUnit(child))
        elif isinstance(child, MaxPool):
            setattr(module, name, PortPool(child))
        else:
            _port_layers(child)
    return module


def make_i3d(settings: Settings) -> VideoModel:
    """I3D of the RGB stream for clips of the settings."""
    width, frames = 0.125 if settings.small else 1.0, settings.frames
    sizes: dict[str, Any] = {"size": settings.size, "frames": frames, "test_frames": frames, "dropout": 0.0}
    return models.build("i3d", num_classes=400, width=width, **sizes)


def make_port(model: VideoModel, settings: Settings, *, channels_last: bool) -> nn.Module:
    """The plain port of `model`, on the device."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    port = Port(model, layout).to(settings.device)
    for weight in port.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=layout)
    return port


def make_clips(model: VideoModel, settings: Settings, batch: int) -> dict[str, Tensor]:
    clips = blank_clips(model.input_spec.train, model.input_spec.size, batch=batch)
    return {stream: (torch.rand_like(clip) * 2 - 1).to(settings.device) for stream, clip in clips.items()}


def make_step(
    model: nn.Module, clips: dict[str, Tensor], precision: str, *, benchmark: bool = False, recorded: bool = False
) -> Callable[[], object]:
    """Forward, loss, backward and SGD with momentum."""
    device = next(iter(clips.values())).device.type
    labels = torch.zeros(len(next(iter(clips.values()))), dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    recorded = recorded and device == "cuda"  # a rehearsal on a CPU cannot
    forward = cuda.record(cast(VideoModel, model.train()), clips, precision) if recorded else model

    def step() -> None:
        torch.backends.cudnn.benchmark = benchmark
        with torch.autocast(device, cuda.DTYPES[precision], enabled=precision != "fp32"):
            loss = models.cross_entropies(forward(clips), labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def make_inference(model: nn.Module, clips: dict[str, Tensor], precision: str = "fp32") -> Callable[[], object]:
    """Logits, under autocast where the precision is not fp32."""
    device = next(iter(clips.values())).device.type

    def infer() -> Tensor:
        with torch.inference_mode(), torch.autocast(device, cuda.DTYPES[precision], enabled=precision != "fp32"):
            return model.eval()(clips)

    return infer


def measure(part: str, variants: Mapping[str, Callable[[], Callable[[], object]]], settings: Settings) -> list[Row]:
    """The rows of variants, each given by a function that makes what is called again and again."""
    deadline = time.monotonic() + settings.seconds
    rows: dict[str, Row] = {}
    ready: dict[str, Callable[[], object]] = {}
    for name, make in variants.items():
        if time.monotonic() > deadline:
            rows[name] = Row(part=part, name=name, error="not begun: out of time")
            continue
        try:
            ready[name], gib = _warm_up(make, settings.device)
            rows[name] = Row(part=part, name=name, gib=gib)
        except Exception as error:  # one variant must not stop the others
            rows[name] = Row(
                part=part, name=name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
    for name, milliseconds in _take_turns(ready, settings, deadline).items():
        rows[name] = replace(rows[name], milliseconds=round(milliseconds, 3))
    return list(rows.values())


def _warm_up(make: Callable[[], Callable[[], object]], device: torch.device) -> tuple[Callable[[], object], float]:
    """What is called, after a first time, and the GiB at that time's peak."""
    call = make()
    with _peak(device) as peak:
        call()
    return call, peak[0]


def _take_turns(calls: Mapping[str, Callable[[], object]], settings: Settings, deadline: float) -> dict[str, float]:
    """The median milliseconds of each call; past the deadline none is made a second time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(settings.rounds):
        for name, call in calls.items():
            if not times[name] or time.monotonic() < deadline:
                times[name].append(_milliseconds(call, settings.device))
    return {name: statistics.median(found) for name, found in times.items()}


@contextmanager
def _peak(device: torch.device) -> Iterator[list[float]]:
    """GiB at the peak of what is done within."""
    found = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device.type == "cuda":
        found[0] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1000
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def per_clip(rows: list[Row], batch: int, flops: float) -> list[Row]:
    """The rows with clips a second and TFLOP/s, of `flops` operations a clip."""

    def told(row: Row) -> Row:
        if not row.milliseconds:
            return row
        tflops = round(batch * flops / row.milliseconds / 1e9, 1)
        return replace(row, clips_per_s=round(batch / row.milliseconds * 1000, 1), tflops=tflops)

    return [told(row) for row in rows]


def measure_training(settings: Settings) -> list[Row]:
    """A step of I3D, ours and the port's."""
    model = make_i3d(settings)
    clips = make_clips(model, settings, settings.batch)

    def ours(
        precision: str,
        *,
        benchmark: bool = False,
        plain: bool = False,
        compiled: bool = False,
        recorded: bool = False,
    ) -> Callable[[], object]:
        own = copy.deepcopy(model)
        placed = own.to(settings.device) if plain else cuda.place(own, settings.device)
        if compiled:
            placed.compile()
        return make_step(placed, clips, precision, benchmark=benchmark, recorded=recorded)

    def port(precision: str, *, benchmark: bool, channels_last: bool) -> Callable[[], object]:
        return make_step(make_port(model, settings, channels_last=channels_last), clips, precision, benchmark=benchmark)

    variants: dict[str, Callable[[], Callable[[], object]]] = {
        f"{TRAINED}, recorded": lambda: ours("bf16", recorded=True),
        TRAINED: lambda: ours("bf16"),
        PORT: lambda: port("bf16", benchmark=True, channels_last=True),
        "ours, bf16, cudnn.benchmark": lambda: ours("bf16", benchmark=True),
        "ours without the layers for CUDA, bf16": lambda: ours("bf16", plain=True),
        "port, bf16": lambda: port("bf16", benchmark=False, channels_last=False),
        "port, fp32 (TF32)": lambda: port("fp32", benchmark=False, channels_last=False),
        "ours, fp16": lambda: ours("fp16"),
        "ours, fp32 (TF32), recorded": lambda: ours("fp32", recorded=True),
    }
    if settings.compile:
        variants["ours, bf16, compiled"] = lambda: ours("bf16", compiled=True)
    with _tf32():
        rows = measure("training", variants, settings)
    return per_clip(rows, settings.batch, 3 * count_flops(model.config))


@contextmanager
def _tf32() -> Iterator[None]:
    """TensorFloat-32 for products, as a training in fp32 has it."""
    cuda.allow_tf32(True)
    try:
        yield
    finally:
        cuda.allow_tf32(False)
        torch.backends.cudnn.benchmark = False


def measure_inference(settings: Settings) -> list[Row]:
    """Logits of clips by I3D, as it is trained and folded."""
    model = make_i3d(settings)
    clips = make_clips(model, settings, settings.batch)

    def folded(precision: str) -> Callable[[], object]:
        return make_inference(cuda.place(fold_batch_norm(model, dtype=cuda.DTYPES[precision]), settings.device), clips)

    def port(precision: str) -> Callable[[], object]:
        return make_inference(make_port(model, settings, channels_last=True), clips, precision)

    rows = measure(
        "inference",
        {
            "port, bf16, channels_last_3d": lambda: port("bf16"),
            "ours, bf16 autocast": lambda: make_inference(
                cuda.place(copy.deepcopy(model), settings.device), clips, "bf16"
            ),
            "ours, folded, fp32 (no TF32)": lambda: folded("fp32"),
            INFERRED: lambda: folded("bf16"),
            "ours, folded, fp16": lambda: folded("fp16"),
        },
        settings,
    )
    return per_clip(rows, settings.batch, count_flops(model.config))


def measure_conv1(settings: Settings) -> list[Row]:
    """conv1 of I3D, forward and weight gradient in bf16, by each way to give tensor cores enough channels."""
    shape = (settings.batch, 3, settings.frames, settings.size, settings.size)
    clip = torch.rand(shape, device=settings.device).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    conv = Convolution(3, 64, (7, 7, 7), stride=(2, 2, 2)).to(settings.device)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "three channels": lambda x, w: nn.functional.conv3d(_padded(x, w.shape[2:], conv.stride), w, None, conv.stride),
        "zeros up to eight channels": _convolve_padded,
        "windows along the width": _convolve_windows,
        "blocks as channels (ours)": lambda x, w: cuda.convolve_clip(x, w, None, conv.stride),
    }

    def make(way: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def step() -> None:
            y = way(clip, conv.weight.bfloat16())
            y.backward(torch.ones_like(y))

        return step

    return measure("conv1", {name: lambda way=way: make(way) for name, way in ways.items()}, settings)  # type: ignore[misc]


def _convolve_padded(x: Tensor, weight: Tensor) -> Tensor:
    """Kernel 7, stride 2 in each axis, with five channels of zeros."""
    x, weight = (
        nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, 5)).contiguous(memory_format=torch.channels_last_3d)
        for t in (_padded(x, (7, 7, 7), (2, 2, 2)), weight)
    )
    return nn.functional.conv3d(x, weight, None, (2, 2, 2))


def _convolve_windows(x: Tensor, weight: Tensor) -> Tensor:
    """The same with the eight columns from an output's first on as channels, 24 of them, and a kernel of width 1."""
    windows = nn.functional.pad(_padded(x, (7, 7, 7), (2, 2, 2)), (0, 1)).unfold(4, 8, 2)  # (B, C, T, H, W', 8)
    rows = windows.permute(0, 2, 3, 4, 5, 1).flatten(4).permute(0, 4, 1, 2, 3)
    wide = nn.functional.pad(weight, (0, 1)).permute(0, 4, 1, 2, 3).flatten(1, 2).unsqueeze(4)
    return nn.functional.conv3d(rows, wide.contiguous(memory_format=torch.channels_last_3d), None, (2, 2, 1))


def measure_pools(settings: Settings) -> list[Row]:
    """Each max-pool of I3D, forward and backward in bf16: PyTorch's and ours."""
    pools: dict[str, tuple[MaxPool, torch.Size]] = {}
    model = make_i3d(settings).to("meta")
    for name, module in model.named_modules():
        if isinstance(module, MaxPool):
            module.register_forward_hook(lambda pool, x, _, name=name: pools.update({name: (pool, x[0].shape)}))
    model({"rgb": torch.empty(settings.batch, 3, settings.frames, settings.size, settings.size, device="meta")})
    variants: dict[str, Callable[[], Callable[[], object]]] = {}
    for name, (pool, shape) in pools.items():
        for way, own in (
            ("PyTorch", MaxPool(pool.kernel, pool.stride)),
            ("ours", cuda.adapt(MaxPool(pool.kernel, pool.stride))),
        ):
            variants[f"{name}, {way}"] = lambda own=own, shape=shape: _pool_step(own, shape, settings.device)  # type: ignore[misc]
    return measure("pools", variants, settings)


def _pool_step(pool: nn.Module, shape: torch.Size, device: torch.device) -> Callable[[], object]:
    x = torch.rand(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last_3d).requires_grad_()

    def step() -> None:
        y = pool(x)
        y.backward(torch.ones_like(y))

    return step


def _make_training(model: VideoModel, clips: dict[str, Tensor], device: torch.device) -> Callable[[], object]:
    return make_step(cuda.place(copy.deepcopy(model), device), clips, "bf16", recorded=True)


def _make_inference(model: VideoModel, clips: dict[str, Tensor], device: torch.device) -> Callable[[], object]:
    return make_inference(cuda.place(fold_batch_norm(model, dtype=torch.bfloat16), device), clips)


def measure_networks(settings: Settings) -> list[Row]:
    """A step and an inference of each of the five networks at its own clips, in bf16."""
    rows = []
    for name in models.CONFIGS:
        sizes: dict[str, Any] = {"size": 32} if settings.small and name != "c3d" else {}
        model = models.build(name, num_classes=400, width=0.0625 if settings.small else 1.0, **sizes)
        clips = make_clips(model, settings, settings.batch)
        found = measure(
            "networks",
            {
                f"{name}, training": partial(_make_training, model, clips, settings.device),
                f"{name}, inference": partial(_make_inference, model, clips, settings.device),
            },
            settings,
        )
        flops = count_flops(model.config)
        rows += [*per_clip(found[:1], settings.batch, 3 * flops), *per_clip(found[1:], settings.batch, flops)]
    return rows


def profile_step(settings: Settings, *, most: int = 25) -> list[Row]:
    """Where the time of our step goes: its longest kernels, with their share of it in the name."""
    model = make_i3d(settings)
    clips = make_clips(model, settings, settings.batch)
    step = make_step(cuda.place(model, settings.device), clips, "bf16")
    step()
    step()
    on_gpu = settings.device.type == "cuda"
    with torch.profiler.profile() as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in profiler.key_averages()}
    calls = {e.key: e.count for e in profiler.key_averages()}
    total = sum(spent.values())
    longest = sorted(spent, key=lambda key: -spent[key])[:most]
    return [
        Row(
            part="profile",
            name=f"{spent[key] / total:.1%} {calls[key]} × {key[:90]}",
            milliseconds=round(spent[key] / 1000, 3),
        )
        for key in longest
    ]


MEASURES: dict[Part, Callable[[Settings], list[Row]]] = {
    "training": measure_training,
    "inference": measure_inference,
    "conv1": measure_conv1,
    "pools": measure_pools,
    "networks": measure_networks,
    "profile": profile_step,
}


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """`train_clips_per_s`, `infer_clips_per_s` and `train_over_port`, those of them that were measured."""
    speeds = {(row.part, row.name): row.clips_per_s for row in rows if row.clips_per_s}
    trained = [speed for (part, name), speed in speeds.items() if part == "training" and name.startswith(TRAINED)]
    found = {"infer_clips_per_s": speeds.get(("inference", INFERRED)), "train_clips_per_s": max(trained, default=None)}
    port = speeds.get(("training", PORT))
    if trained and port:
        found["train_over_port"] = round(max(trained) / port, 3)
    return {name: value for name, value in found.items() if value is not None}


def print_row(row: Row) -> None:
    cells = [f"{row.milliseconds:10.3f} ms"] if row.milliseconds is not None else [row.error]
    cells += [f"{row.clips_per_s:9.1f} clips/s {row.tflops:7.1f} TFLOP/s"] if row.clips_per_s else []
    cells += [f"{row.gib:7.2f} GiB"] if row.gib else []
    print(f"{row.part:10}{row.name:60}" + "".join(cells), flush=True)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.small:
        torch.set_num_threads(1)
        settings = Settings(parts=settings.parts, batch=2, frames=16, size=32, rounds=1, small=True, json=settings.json)
    elif not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; --small runs every variant on a CPU, small")
    where = torch.cuda.get_device_name() if settings.device.type == "cuda" else "CPU, small: the times mean nothing"
    print(f"{where}; torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}", flush=True)
    if settings.device.type == "cuda":
        cuda.set_up(settings.device, "bf16", training=False)
    rows: list[Row] = []
    for part in settings.parts:
        for row in MEASURES[part](settings):
            print_row(row)
            rows.append(row)
    if settings.json:
        print(json.dumps({**ratios(rows), "device": where, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
