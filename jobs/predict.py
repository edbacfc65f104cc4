"""Say what happens in one video: class probabilities of the RGB stream, the flow stream and both together.

    python jobs/predict.py VIDEO --rgb CKPT --flow CKPT          raw video, on disk or s3://; one stream is enough
    python jobs/predict.py VIDEO --rgb rgb_imagenet.pt --flow flow_imagenet.pt --classes label_map.txt

CKPT is a checkpoint directory of this project, DeepMind's TensorFlow checkpoint, or a PyTorch file converted from it.
The published scores of DeepMind's sample come, with D=data of github.com/google-deepmind/kinetics-i3d, from

    python jobs/predict.py --classes $D/label_map.txt \\
        --clips $D/v_CricketShot_g04_c01_rgb.npy $D/v_CricketShot_g04_c01_flow.npy \\
        --rgb $D/checkpoints/rgb_imagenet/model.ckpt --flow $D/checkpoints/flow_imagenet/model.ckpt

    expected, class "playing cricket":   joint  logit 41.8137, norm of all logits 138.468658
    (last digits vary with processors)   rgb    logit 25.8566, norm of all logits  87.108871
                                         flow   logit 15.9570, norm of all logits  63.252754

It runs on a GPU where there is one, TV-L1 included.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal
from zipfile import BadZipFile

import numpy as np
import torch
import tyro
from torch import Tensor

from jobs.cluster import check_precision
from jobs.command import run_command
from models import clip_scores, cuda
from models.folding import fold_batch_norm
from models.input_spec import CHANNELS, STREAMS, Stream
from pipelines import storage
from pipelines.clips.sampling import Frames, count_test_frames, decoding_of
from pipelines.clips.tensors import cut_test_clips
from pipelines.errors import InputError, NetworkError, SettingsError, VideoError
from pipelines.evaluation.raw_video import compute_flow, read_video
from pipelines.formatting import format_count
from pipelines.media.decode import DecodeSettings
from pipelines.training.trained_network import Network, load_network
from pipelines.tvl1.params import FlowPreset

Precision = Literal["fp32", "bf16", "fp16"]

MAX_SCALED = 1.5  # resampling may overshoot [-1, 1] a little; pixels and colour values are far above


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify one video with one stream, or with both, whose logits are added."""

    video: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")] = None
    """Video file, on disk or s3://. I3D sees its first 250 frames, at the rate that it was trained at;
    short videos are looped."""
    clips: tuple[str, ...] = ()
    """Clips instead of a video: .npy files, float (1, T, H, W, 3) for RGB, (1, T, H, W, 2) for flow, in [-1, 1]."""
    rgb: str | None = None
    """Network of the RGB stream: a run, a checkpoint, a TensorFlow checkpoint or a PyTorch file."""
    flow: str | None = None
    """Network of the flow stream, in the same forms."""
    classes: str | None = None
    """Text file with one class name per line. None: the names in the checkpoint, or numbers if there are none."""
    top: int = 5
    """How many of the most probable classes to print."""
    flow_preset: FlowPreset = "faithful"
    """TV-L1 preset. Use the one that the flow network was trained with."""
    precision: Precision = "fp32"
    """Precision of the network. bf16 is faster where supported, its logits off by half a percent; fp16 needs a GPU."""

    def __post_init__(self) -> None:
        if (self.video is None) == (not self.clips):
            raise SettingsError("give either a video or --clips")
        if self.rgb is None and self.flow is None:
            raise SettingsError("no network is given: name one by --rgb, by --flow, or one by each")
        if self.top < 1:
            raise SettingsError(f"--top is {self.top}: give at least 1")
        for uri in (self.video, *self.clips, self.rgb, self.flow, self.classes):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, predict, print."""
    run_command(Predict, run, __doc__, stopped="nothing was written")


def run(config: Predict) -> None:
    """Load the networks, get their clips, score those, print the tables."""
    networks = load_networks({"rgb": config.rgb, "flow": config.flow})
    names = name_classes(networks, config.classes)
    clips = read_clips(config.clips, networks) if config.clips else cut_clips(config, networks)
    device = find_device(config.precision)
    print(f"source {config.video or ' '.join(config.clips)}")
    logits: dict[str, Tensor] = {}
    for stream, network in networks.items():
        seen = describe_clips(clips[stream])
        print(
            f"{stream:7}{getattr(config, stream)} on {seen}; {describe_precision(config.precision, device)}", flush=True
        )
        logits[stream] = score(network, stream, clips[stream], config.precision, device)
    if len(logits) > 1:
        # Equal weight, as in the paper's evaluation.
        logits["joint"] = torch.stack(list(logits.values())).sum(dim=0)
    print(f"\n{format_streams(logits, names)}\n\n{format_top(logits, names, config.top)}")


def load_networks(given: Mapping[Stream, str | None]) -> dict[Stream, Network]:
    """The networks asked for by stream; InputError where they know different numbers of classes."""
    networks = {stream: load_one(path, stream) for stream, path in given.items() if path is not None}
    counts = {stream: network.model.config.num_classes for stream, network in networks.items()}
    if len(set(counts.values())) > 1:
        raise InputError(
            f"--rgb knows {format_count(counts['rgb'], 'class')}, --flow {counts['flow']}: their logits cannot be added"
        )
    return networks


def load_one(path: str, stream: Stream) -> Network:
    """One network of one stream; InputError says what is wrong."""
    try:
        return load_network(path, stream=stream)
    except NetworkError as error:
        raise InputError(f"--{stream} {error}") from error


def name_classes(networks: Mapping[Stream, Network], path: str | None) -> Sequence[str]:
    """The names of the classes, in the order of the logits; InputError where two sources differ."""
    sources = {f"--{stream}": network.classes for stream, network in networks.items()}
    sources["--classes"] = None if path is None else _read_names(path)
    # Where more than one source names the classes, all are asked: a list in another order would give wrong names.
    named = {source: names for source, names in sources.items() if names is not None}
    num_classes = next(iter(networks.values())).model.config.num_classes
    if path is not None and len(named["--classes"]) != num_classes:
        raise InputError(
            f"--classes {path} has {len(named['--classes'])} names, the networks {format_count(num_classes, 'class')}"
        )
    if len(set(named.values())) > 1:
        raise InputError(f"{' and '.join(named)} name the classes differently, or in another order")
    return next(iter(named.values()), tuple(f"class {index}" for index in range(num_classes)))


def _read_names(path: str) -> tuple[str, ...]:
    try:
        lines = storage.read_text(path).splitlines()
    except OSError as error:
        raise InputError(f"--classes: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {path} is no UTF-8 text, one name a line") from error
    return tuple(line.strip() for line in lines if line.strip())


def cut_clips(config: Predict, networks: Mapping[Stream, Network]) -> dict[Stream, Tensor]:
    """The test clips (N, C, T, H, W) of the video for each network, by its own input spec."""
    assert config.video is not None, "checked by the settings"
    clips: dict[Stream, Tensor] = {}
    decoded: dict[tuple[DecodeSettings, int], Frames] = {}
    for stream, network in networks.items():
        input_spec, settings = network.model.input_spec, network.settings
        # One frame more than RGB needs: flow has one fewer than the frames that it is computed from.
        wanted = decoding_of(input_spec, settings), count_test_frames(input_spec) + 1
        # Both streams mostly want the same frames: they are decoded once.
        if wanted not in decoded:
            decoded[wanted] = decode(config.video, *wanted)
        frames = decoded[wanted]
        # TV-L1 of whole frames, as in the extraction; the crop is cut from its flow.
        video = {"rgb": frames} if stream == "rgb" else {"flow": compute_flow(frames, config.flow_preset)}
        try:
            clips[stream] = cut_test_clips(video, input_spec, settings)[stream]
        except ValueError as error:
            raise InputError(f"{config.video}: {error}") from error
    return clips


def decode(uri: str, settings: DecodeSettings, num_frames: int) -> Frames:
    """The first frames (T, H, W, 3) uint8 RGB of a video, at most `num_frames`."""
    try:
        return read_video(uri, settings, most=lambda fps: num_frames).frames
    except OSError as error:  # names the URI
        raise InputError(str(error)) from error
    except VideoError as error:
        raise InputError(f"{uri}: {error}") from error


def read_clips(uris: Iterable[str], networks: Mapping[Stream, Network]) -> dict[Stream, Tensor]:
    """Ready-made clips (1, C, T, H, W), one for each network, from .npy files; told apart by their channels."""
    clips: dict[Stream, Tensor] = {}
    for uri in uris:
        stream, clip = read_clip(uri)
        if stream not in networks:
            raise InputError(f"--clips {uri} is {stream}, but no network is given by --{stream}")
        if stream in clips:
            raise InputError(f"--clips names two files of {stream}; give one clip of each stream")
        clips[stream] = clip
    if absent := networks.keys() - clips.keys():
        raise InputError(f"--clips has no file of {min(absent)}, which the network given by --{min(absent)} needs")
    return {stream: clips[stream] for stream in networks}


def read_clip(uri: str) -> tuple[Stream, Tensor]:
    """The stream and the clip (1, C, T, H, W) float32 of a .npy file; pickled arrays are refused."""
    try:
        array = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    except OSError as error:
        raise InputError(f"--clips: {error}") from error
    except (ValueError, EOFError, BadZipFile) as error:  # numpy's own message advises to run what may be hostile
        raise InputError(f"--clips {uri} is no whole .npy file of numbers; pickled objects are not read") from error
    stream = _stream_of(array)
    if stream is None:
        contents = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise InputError(f"--clips {uri} is {contents}; needed are floats (1, T, H, W, 3) for RGB or (…, 2) for flow")
    # Not `>`: NaN must be refused too.
    if not np.abs(array).max() <= MAX_SCALED:
        raise InputError(f"--clips {uri} is not scaled to [-1, 1]: it has values of {np.abs(array).max():g}")
    return stream, torch.from_numpy(array.astype(np.float32)).permute(0, 4, 1, 2, 3)


def _stream_of(array: object) -> Stream | None:
    """The stream whose clip (1, T, H, W, C) of floats this is, by its channels; None for anything else."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 5:
        return None
    if len(array) != 1 or array.size == 0:
        return None
    return next((stream for stream in STREAMS if array.shape[4] == CHANNELS[stream]), None)


def find_device(precision: Precision) -> torch.device:
    """The GPU where there is one, set up, else the CPU; InputError where it cannot be computed on in this precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_precision(precision, torch.cuda.device_count())
        cuda.set_up(device, precision, training=False)
    except ValueError as error:
        raise InputError(str(error)) from error
    return device


def describe_precision(precision: Precision, device: torch.device) -> str:
    return f"{precision}, cpu" if device.type == "cpu" else f"{cuda.describe(precision, training=False)}, {device.type}"


@torch.no_grad()
def score(network: Network, stream: Stream, clips: Tensor, precision: Precision, device: torch.device) -> Tensor:
    """Logits (num_classes,) float32 of clips (N, C, T, H, W), their mean where there are several."""
    # Folded first: `place` knows the form for CUDA of a folded unit.
    model = cuda.place(fold_batch_norm(network.model, dtype=cuda.DTYPES[precision]), device)
    try:
        logits = model(clips.to(device))
    except ValueError as error:  # a clip that the network is not made for
        raise InputError(f"--{stream}: {error}") from error
    scores = clip_scores(logits).float().mean(dim=0).cpu()
    if not scores.isfinite().all():
        raise InputError(f"--{stream}: its scores are infinite or not a number: try --precision fp32")
    return scores


def describe_clips(clips: Tensor) -> str:
    """`1 clip of 250 frames, 224×224 px`."""
    num_clips, _, num_frames, height, width = clips.shape
    return f"{format_count(num_clips, 'clip')} of {format_count(num_frames, 'frame')}, {width}×{height} px"


def format_streams(logits: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """A line for each stream and for their sum: the top class, its probability and logit, the norm of all logits."""
    lines = [f"{'stream':7}{'norm of logits':>15}{'logit':>11}{'probability':>13}  top class"]
    for stream, row in logits.items():
        best = int(row.argmax())
        norm, probability = float(torch.linalg.vector_norm(row)), float(row.softmax(dim=0)[best])
        lines.append(f"{stream:7}{norm:15.6f}{float(row[best]):11.4f}{probability:13.4f}  {names[best]}")
    return "\n".join(lines)


def format_top(logits: Mapping[str, Tensor], names: Sequence[str], top: int) -> str:
    """The classes that are most probable by the sum of all streams (the last row of `logits`), with every logit."""
    columns = list(logits)[::-1]
    total = logits[columns[0]]
    titles = "".join(f"{f'{stream} logit':>13}" for stream in columns)
    lines = [f"{'probability':>11}{titles}  class"]
    # Stable, so that of equal classes the first comes first, as in an evaluation.
    for index in total.argsort(descending=True, stable=True)[:top].tolist():
        values = "".join(f"{float(logits[stream][index]):13.4f}" for stream in columns)
        lines.append(f"{float(total.softmax(dim=0)[index]):11.4f}{values}  {names[index]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
