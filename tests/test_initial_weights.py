"""What a training begins with: drawn by the seed, or carried over with or without the classifier."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from i3d_reference import released_variables
from test_inflation import image_trunk, torchvision_state
from test_pretrained import as_piergiaj

import models
from models import checkpoint
from models.checkpoint import Metadata
from models.input_spec import ModelConfig
from pipelines.clips.sampling import ClipSettings
from pipelines.errors import NetworkError
from pipelines.media.codec import CodecSettings
from pipelines.training.initial_weights import InitialWeights, Source, make_model

SMALL = {"width": 0.125, "size": 32, "frames": 16}


def config_of(num_classes: int = 3, **settings: object) -> ModelConfig:
    return models.configure("i3d", num_classes=num_classes, **{**SMALL, "stream": "rgb", **settings})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint of three classes, and its tensors."""
    torch.manual_seed(9)
    model = models.build_from(config_of(bn_gamma=True))
    checkpoint.save(tmp_path / "saved", model, Metadata(classes=("a", "b", "c")))
    return str(tmp_path / "saved"), model.state_dict()


def test_scratch_follows_the_seed() -> None:
    first, again, other = (make_model(config_of(), InitialWeights(), ("a",) * 3, seed=seed) for seed in (1, 1, 2))
    name = "trunk.Mixed_4b.Branch_0.Conv3d_0a_1x1.conv.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_a_checkpoint_of_the_same_classes_is_taken_whole(saved: tuple[str, dict[str, torch.Tensor]]) -> None:
    initial = InitialWeights(source="checkpoint", weights=saved[0])
    model = make_model(config_of(dropout=0.1), initial, ("a", "b", "c"), seed=0)
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in model.state_dict().items())
    assert model.config == replace(config_of(dropout=0.1), bn_gamma=True)


def test_other_classes_get_a_classifier_of_their_own(saved: tuple[str, dict[str, torch.Tensor]]) -> None:
    initial = InitialWeights(source="checkpoint", weights=saved[0], finetune="full")
    state = make_model(config_of(num_classes=5), initial, tuple("vwxyz"), seed=0).state_dict()
    kept = {name for name, tensor in state.items() if torch.equal(tensor, saved[1].get(name, torch.empty(0)))}
    assert state.keys() - kept == {"logits.weight", "logits.bias"} - kept
    assert state["logits.weight"].shape[0] == 5


def test_other_classes_without_a_new_classifier_are_refused(saved: tuple[str, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="--finetune full or head"):
        make_model(config_of(), InitialWeights(source="checkpoint", weights=saved[0]), ("x", "y", "z"), seed=0)


def test_another_network_or_width_is_refused(saved: tuple[str, dict[str, torch.Tensor]]) -> None:
    initial = InitialWeights(source="checkpoint", weights=saved[0])
    with pytest.raises(ValueError, match="weights are of i3d; the model is c3d"):
        make_model(models.configure("c3d", num_classes=3), initial, ("a", "b", "c"), seed=0)
    with pytest.raises(ValueError, match="tensors do not fit"):
        make_model(config_of(width=0.25), initial, ("a", "b", "c"), seed=0)


def spoil_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_weights(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"no weights")


def spoil_settings(folder: Path) -> None:
    (folder / "model.json").write_text("{}{")


def spoil_clips(folder: Path) -> None:
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**described, "clips": {"unheard": 1}}))


def spoil_numbers(folder: Path) -> None:
    model, metadata = checkpoint.load(folder)
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    checkpoint.save(folder, model, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_folder, "holds no checkpoint"),
        (spoil_weights, "the file is damaged"),
        (spoil_settings, "Extra data"),
        (spoil_clips, "unheard"),
        (spoil_numbers, "its training has diverged"),
    ],
)
def test_a_checkpoint_that_cannot_be_begun_with_is_one_sentence(
    saved: tuple[str, dict[str, torch.Tensor]], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(Path(saved[0]))
    initial = InitialWeights(source="checkpoint", weights=saved[0])
    with pytest.raises(NetworkError, match=rf"^--weights \S+saved: .*{words}"):
        make_model(config_of(), initial, ("a", "b", "c"), seed=0, clips=ClipSettings())


@pytest.mark.parametrize("source", ["imagenet", "kinetics"])
@pytest.mark.parametrize("content", [None, b"hello", b""])
def test_files_that_are_no_weights_are_one_sentence(tmp_path: Path, source: Source, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "weights.pt").write_bytes(content)
    initial = InitialWeights(source=source, weights=str(tmp_path / "weights.pt"))
    with pytest.raises(NetworkError, match=r"^--weights \S+weights.pt: "):
        make_model(config_of(), initial, ("a", "b", "c"), seed=0, clips=ClipSettings())


def save_cut(folder: Path, stream: str, clips: ClipSettings, **settings: object) -> InitialWeights:
    """A checkpoint that was trained on clips that were cut so."""
    model = models.build_from(config_of(stream=stream, **settings))
    convention = CodecSettings().flow_convention() if stream == "flow" else None
    metadata = Metadata(classes=("a", "b", "c"), clips=clips.to_json(), flow_convention=convention)
    checkpoint.save(folder / "cut", model, metadata)
    return InitialWeights(source="checkpoint", weights=str(folder / "cut"))


@pytest.mark.parametrize(
    ("theirs", "ours", "remedy"),
    [
        ({"flow_bound": 2}, {"flow_bound": 20}, "--flow-bound 2 where this training has 20: give --flow-bound 2"),
        ({"flow_bound": 8, "resize": "square"}, {"flow_bound": 8}, "has shorter: give --resize square"),
        ({}, {}, ""),
    ],
)
def test_a_checkpoint_of_clips_that_were_cut_otherwise_is_refused(
    tmp_path: Path, theirs: dict[str, object], ours: dict[str, object], remedy: str
) -> None:
    initial = save_cut(tmp_path, "flow", ClipSettings(**theirs))  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match=remedy) if remedy else nullcontext():
        make_model(config_of(stream="flow"), initial, ("a", "b", "c"), seed=0, clips=ClipSettings(**ours))  # type: ignore[arg-type]


def test_a_checkpoint_of_another_frame_step_is_refused_and_the_bound_of_rgb_is_none(tmp_path: Path) -> None:
    initial = save_cut(tmp_path, "rgb", ClipSettings(flow_bound=2), frame_step=2)
    with pytest.raises(NetworkError, match=r"--set frame_step 2 where .* has 1: give --set frame_step=2$"):
        make_model(config_of(), initial, ("a", "b", "c"), seed=0, clips=ClipSettings())
    make_model(config_of(frame_step=2), initial, ("a", "b", "c"), seed=0, clips=ClipSettings())


def test_released_weights_on_shards_of_another_bound_are_refused(tmp_path: Path) -> None:
    torch.save(as_piergiaj(released_variables(2)), tmp_path / "flow_imagenet.pt")
    initial = InitialWeights(source="kinetics", weights=str(tmp_path / "flow_imagenet.pt"), finetune="full")
    config = models.configure("i3d", num_classes=3, stream="flow")
    with pytest.raises(NetworkError, match="--flow-bound 20 where this training has 8: give --flow-bound 20"):
        make_model(config, initial, ("a", "b", "c"), seed=0, clips=ClipSettings(flow_bound=8))
    make_model(config, initial, ("a", "b", "c"), seed=0, clips=ClipSettings(flow_bound=20))


def test_released_kinetics_weights_get_a_classifier_for_other_classes(tmp_path: Path) -> None:
    variables = released_variables(3)
    torch.save(as_piergiaj(variables), tmp_path / "rgb_imagenet.pt")
    initial = InitialWeights(source="kinetics", weights=str(tmp_path / "rgb_imagenet.pt"), finetune="full")
    config = models.configure("i3d", num_classes=101, stream="rgb", dropout=0.3)
    model = make_model(config, initial, tuple(map(str, range(101))), seed=0)
    released = variables["Conv3d_1a_7x7/conv_3d/w"].permute(4, 3, 0, 1, 2)
    assert torch.equal(model.state_dict()["trunk.Conv3d_1a_7x7.conv.weight"], released)
    assert model.state_dict()["logits.weight"].shape[0] == 101
    assert model.config.dropout == 0.3


def test_an_imagenet_file_is_inflated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torchvision_state(image_trunk())
    torch.save(images, tmp_path / "googlenet.pth")
    initial = InitialWeights(source="imagenet", weights=str(tmp_path / "googlenet.pth"), inflation="center")
    model = make_model(models.configure("i3d", num_classes=3, stream="flow"), initial, ("a", "b", "c"), seed=0)
    middle = model.state_dict()["trunk.Conv3d_2c_3x3.conv.weight"][:, :, 1]
    assert torch.equal(middle, images["conv3.conv.weight"])


def test_the_last_checkpoint_of_a_run_is_found(saved: tuple[str, dict[str, torch.Tensor]]) -> None:
    run = Path(saved[0]).parent
    (run / "result.json").write_text('{"last": "saved", "best": "none"}')
    initial = InitialWeights(source="checkpoint", weights=str(run))
    state = make_model(config_of(), initial, ("a", "b", "c"), seed=0).state_dict()
    assert torch.equal(state["logits.weight"], saved[1]["logits.weight"])


@pytest.mark.parametrize("wrong", [{"source": "kinetics"}, {"weights": "x"}, {"finetune": "head"}])
def test_flags_that_do_not_go_together(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"--init|--finetune"):
        InitialWeights(**wrong)  # type: ignore[arg-type]
