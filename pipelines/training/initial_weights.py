"""The weights that a training begins with: drawn, inflated from ImageNet, released Kinetics weights, or a checkpoint.

A network for other classes keeps everything but its classifier, which is drawn anew (the paper's transfer to UCF-101
and HMDB-51, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from tyro.conf import arg

import models
from models import checkpoint
from models.i3d import I3DConfig
from models.inflation import Mode, inflate
from models.input_spec import ModelConfig
from models.pretrained import load_released, read_released
from models.video_model import VideoModel
from pipelines.clips.sampling import ClipSettings, settings_of
from pipelines.errors import NetworkError, SettingsError
from pipelines.training.trained_network import check_finite, plain_loading
from pipelines.training.weights_files import find_checkpoint, local_checkpoint

Source = Literal["scratch", "imagenet", "kinetics", "checkpoint"]
Finetune = Literal["full", "head"]


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Where they come from."""

    source: Annotated[Source, arg(name="init")] = "scratch"
    """Initial weights: random (scratch), 2-D ImageNet weights inflated, released Kinetics weights, or a checkpoint."""
    weights: str | None = None
    """File, checkpoint or run folder for --init, on disk or s3://."""
    inflation: Mode = "mean"
    """How 2-D filters become 3-D: repeated and divided (mean), or placed at the central time step (center)."""
    finetune: Finetune | None = None
    """Transfer to other classes: train all layers (full, the paper's full-FT), or only a new classifier (head)."""

    @property
    def new_head(self) -> bool:
        """Whether the classifier is drawn anew."""
        return self.finetune is not None

    def __post_init__(self) -> None:
        if (self.source == "scratch") != (self.weights is None):
            raise SettingsError(
                f"--init is {self.source} and --weights {self.weights or 'not given'}: "
                "scratch takes no weights, imagenet, kinetics and checkpoint each need theirs"
            )
        if self.source == "scratch" and self.new_head:
            raise SettingsError(
                "--finetune needs weights to start from: give --init kinetics or checkpoint, and --weights"
            )

    def describe(self) -> str:
        """`kinetics flow_imagenet.pt, new classifier`."""
        head = ", new classifier" if self.new_head else ""
        mode = f", {self.inflation}" if self.source == "imagenet" else ""
        return f"{self.source}{f' {self.weights}' if self.weights else ''}{mode}{head}"


def make_model(
    config: ModelConfig,
    initial: InitialWeights,
    classes: tuple[str, ...],
    *,
    seed: int,
    clips: ClipSettings | None = None,
    searched: bool = False,
) -> VideoModel:
    """A new network with its initial weights; what is drawn follows from the seed.

    Released weights and checkpoints decide about batch norm's gamma. Raises NetworkError where the weights cannot be
    read, are of another network, of other shapes, of other classes whose classifier is to be kept or, where `clips`
    are given, of frames that were cut otherwise; of a `searched` geometry the frame step may be another.
    """
    # Set in any case: a new classifier, or what an ImageNet file lacks, is drawn as well.
    torch.manual_seed(seed)
    if initial.weights is None:
        return models.build_from(config)
    # DeepMind released I3D only.
    if initial.source == "kinetics" and not isinstance(config, I3DConfig):
        raise NetworkError(f"released Kinetics weights are of i3d; the model is {models.name_of(config)}")
    source: VideoModel
    known, source_clips = None, ClipSettings()
    with plain_loading(f"--weights {initial.weights}"):
        uri = find_checkpoint(initial.weights)
        with local_checkpoint(uri) as path:
            if initial.source == "imagenet":
                model = models.build_from(config)
                inflate(model, read_released(path), mode=initial.inflation)
                check_finite(model)
                return model
            if isinstance(config, I3DConfig) and initial.source == "kinetics":
                source = load_released(path, stream=config.stream)
            else:
                source, metadata = checkpoint.load(path)
                known, source_clips = metadata.classes, settings_of(metadata.clips, metadata.flow_convention)
        check_finite(source)
    if clips is not None:
        _check_cutting(uri, source.config, source_clips, config, clips, searched=searched)
    if known is not None and not initial.new_head and known != classes:
        raise NetworkError(
            f"the classes of {uri} are not those of the data: --finetune full or head draws a classifier"
        )
    return _transfer(source, config, new_head=initial.new_head)


def _check_cutting(
    uri: str,
    source: ModelConfig,
    source_clips: ClipSettings,
    config: ModelConfig,
    clips: ClipSettings,
    *,
    searched: bool,
) -> None:
    """NetworkError where the network would see clips that were cut otherwise than those its weights have learned."""
    wanted: list[tuple[str, str, str]] = [("--resize", source_clips.resize, clips.resize)]
    if "flow" in models.input_spec_of(config).train.streams:
        wanted.append(("--flow-bound", f"{source_clips.bound:g}", f"{clips.bound:g}"))
    # A search has tried other steps with these very weights, and found that this one is better.
    if not searched and hasattr(config, "frame_step") and hasattr(source, "frame_step"):
        wanted.append(("--set frame_step", str(source.frame_step), str(config.frame_step)))
    different = [(flag, theirs, ours) for flag, theirs, ours in wanted if theirs != ours]
    if different:
        joined = ", ".join(f"{flag} {theirs} where this training has {ours}" for flag, theirs, ours in different)
        flags = " ".join(f"{flag}{'=' if ' ' in flag else ' '}{theirs}" for flag, theirs, _ in different)
        raise NetworkError(f"the weights of {uri} were trained with {joined}: give {flags}")


def _transfer(source: VideoModel, config: ModelConfig, *, new_head: bool) -> VideoModel:
    """A network of these settings with the weights of another one, classifier included unless it is drawn anew."""
    if type(source.config) is not type(config):
        stored, wanted = models.name_of(source.config), models.name_of(config)
        raise NetworkError(f"the weights are of {stored}; the model is {wanted}")
    # Released weights have no gamma, and one that is drawn would be a layer that the source did not have.
    if hasattr(config, "bn_gamma"):
        config = replace(config, bn_gamma=source.config.bn_gamma)  # type: ignore[call-arg, attr-defined]
    model = models.build_from(config)
    # Compared here and not by load_state_dict: only the classifier may differ, and a message names what else does.
    own, state = model.state_dict(), source.state_dict()
    transferred = {name: tensor for name, tensor in state.items() if not (new_head and "logits" in name.split("."))}
    wrong = [
        f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}" if name in own else f"{name} in excess"
        for name, tensor in transferred.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        raise NetworkError(
            f"{len(wrong)} tensors do not fit: {', '.join(wrong[:3])}. Is it another width or class count?"
        )
    model.load_state_dict(own | transferred)
    return model
