"""2-D weights into three dimensions: names, modes, and the video of one still image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models import convolution
from models.inception import FRAMEWISE, InceptionV1, TemporalExtents, UnitFactory
from models.inflation import inflate, inflate_filter, inflated_state
from models.naming import SLIM, TORCHVISION

TORCHVISION_UNITS = {
    **{"conv1": (64, 3, 7), "conv2": (64, 64, 1), "conv3": (192, 64, 3)},
    **{
        "inception3a.branch1": (64, 192, 1),
        "inception3a.branch2.0": (96, 192, 1),
        "inception3a.branch2.1": (128, 96, 3),
    },
    **{"inception3a.branch3.1": (32, 16, 3), "inception3a.branch4.1": (32, 192, 1)},
    **{
        "inception5b.branch3.1": (128, 48, 3),
        "inception4e.branch1": (256, 528, 1),
        "inception5a.branch2.1": (320, 160, 3),
    },
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def image_trunk(**unit):
    """A 2-D Inception whose running statistics are not the initial ones."""
    trunk = InceptionV1(3, unit=UnitFactory(**unit), temporal=FRAMEWISE)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.3, 0.7)
            nn.init.uniform_(module.bias, -0.1, 0.3)
    return trunk.eval()


def torchvision_state(trunk):
    """The trunk's weights as torchvision's GoogLeNet spells them, classifier and auxiliary heads included."""
    state = {}
    for name, tensor in trunk.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        state[TORCHVISION.spell(name)] = tensor.squeeze(2) if tensor.ndim == 5 else tensor
        if name.endswith("bn.bias"):
            state[TORCHVISION.spell(name).replace("bias", "weight")] = torch.ones_like(tensor)
            state[TORCHVISION.spell(name).replace("bias", "num_batches_tracked")] = torch.tensor(7)
    heads = {
        "fc.weight": torch.zeros(1000, 1024),
        "fc.bias": torch.zeros(1000),
        "aux1.conv.conv.weight": torch.zeros(1),
    }
    return {**state, **heads, "aux2.fc2.bias": torch.zeros(1000)}


def slim_state(trunk):
    state = {"global_step": torch.tensor(1), "InceptionV1/Logits/Conv2d_0c_1x1/weights": torch.zeros(1, 1, 1024, 1001)}
    for name, tensor in trunk.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            state[SLIM.spell(name)] = tensor.squeeze(2).permute(2, 3, 1, 0) if tensor.ndim == 5 else tensor
    return state


@pytest.fixture(scope="module")
def googlenet():
    torch.manual_seed(0)
    return torchvision_state(image_trunk())


def test_names_are_torchvisions_and_slims(googlenet):
    for unit, (out_channels, in_channels, k) in TORCHVISION_UNITS.items():
        assert googlenet[f"{unit}.conv.weight"].shape == (out_channels, in_channels, k, k)
        assert googlenet[f"{unit}.bn.running_var"].shape == (out_channels,)
    slim = slim_state(image_trunk(width=0.125))
    for name in ("Conv2d_1a_7x7/weights", "Mixed_3c/Branch_1/Conv2d_0b_3x3/BatchNorm/moving_variance"):
        assert f"InceptionV1/{name}" in slim
    assert "InceptionV1/Mixed_5b/Branch_2/Conv2d_0a_3x3/weights" in slim


def test_framewise_trunk_takes_the_weights_as_they_are():
    source, target = image_trunk(width=0.125), image_trunk(width=0.125)
    inflate(target, slim_state(source))
    clip = torch.randn(1, 3, 2, 32, 32)
    torch.testing.assert_close(target(clip), source(clip))


def test_filters_sum_to_the_image_filter_in_both_streams(googlenet):
    for stream, first in (("rgb", googlenet["conv1.conv.weight"]), ("flow", None)):
        model = models.build("i3d", num_classes=4, stream=stream)
        inflate(model, googlenet)
        weight = model.trunk.Conv3d_1a_7x7.conv.weight
        expected = (
            googlenet["conv1.conv.weight"].mean(1, keepdim=True).expand(-1, 2, -1, -1) if first is None else first
        )
        torch.testing.assert_close(weight.sum(dim=2), expected)
        block = model.trunk.Mixed_4e
        torch.testing.assert_close(
            block.Branch_1.Conv3d_0b_3x3.conv.weight[:, :, 1] * 3, googlenet["inception4d.branch2.1.conv.weight"]
        )
        assert torch.equal(
            block.Branch_3.Conv3d_0b_1x1.bn.running_var, googlenet["inception4d.branch4.1.bn.running_var"]
        )


def test_both_streams_of_the_2d_models_are_set(googlenet):
    model = models.build("two_stream", num_classes=4)
    inflate(model, googlenet)
    flow = model.streams["flow"].trunk.Conv3d_1a_7x7.conv.weight
    assert flow.shape == (64, 20, 1, 7, 7)
    torch.testing.assert_close(flow[:, 13, 0], googlenet["conv1.conv.weight"].mean(dim=1))


def test_modes_place_the_filter():
    image = torch.randn(4, 3, 5, 5)
    mean, center = inflate_filter(image, 7), inflate_filter(image, 7, mode="center")
    torch.testing.assert_close(mean[:, :, 6] * 7, image)
    assert torch.equal(center[:, :, 3], image)
    assert torch.equal(center.sum(dim=2), image)
    with pytest.raises(ValueError, match="'mean' or 'center'"):
        inflated_state(image_trunk(width=0.125), {}, mode="middle")


def boring(trunk, mode, frames=32, size=64):
    """Activations of an image, (1, C, 1, h, w), and of its boring video through the inflated trunk."""
    video = InceptionV1(3, unit=UnitFactory(width=0.25), temporal=TemporalExtents()).eval()
    state = inflated_state(video, slim_state(trunk), mode=mode)
    video.load_state_dict(state, strict=False)
    image = torch.rand(1, 3, 1, size, size) * 2 - 1
    return image, video, image.expand(-1, -1, frames, -1, -1)


@torch.no_grad()
def test_boring_video_holds_inside_one_layer_only():
    trunk = image_trunk(width=0.25)
    image, video, clip = boring(trunk, "mean", frames=64)
    errors = (video(clip, "Conv3d_1a_7x7") - trunk(image, "Conv3d_1a_7x7")).abs().amax(dim=(0, 1, 3, 4))
    assert (errors[1:-2] < 1e-5).all()
    assert (errors[[0, -2, -1]] > 1e-3).all()
    at_end = (video(clip) - trunk(image)).abs().amax(dim=(0, 1, 3, 4))
    assert (at_end > 1e-4).all()


@torch.no_grad()
def test_boring_video_holds_everywhere_with_replicated_borders(monkeypatch):
    def replicate_time(x, kernel, stride):
        t, h, w = (convolution.same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True))
        x = nn.functional.pad(x, (0, 0, 0, 0, *t), mode="replicate")
        return nn.functional.pad(x, (*w, *h)), (0, 0, 0)

    trunk = image_trunk(width=0.25)
    image, video, clip = boring(trunk, "mean")
    expected = trunk(image)
    monkeypatch.setattr(convolution, "pad_for_convolution", replicate_time)
    torch.testing.assert_close(video(clip), expected.expand(-1, -1, 4, -1, -1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("frames", [16, 17, 31])
def test_boring_video_holds_everywhere_for_centred_filters(frames):
    trunk = image_trunk(width=0.25)
    image, video, clip = boring(trunk, "center", frames=frames)
    activations = video(clip)
    torch.testing.assert_close(activations, trunk(image).expand_as(activations), atol=1e-5, rtol=1e-4)


def test_one_error_lists_all_that_does_not_fit(googlenet):
    broken = dict(googlenet)
    del broken["inception5b.branch1.conv.weight"]
    broken["inception3a.branch2.1.conv.weight"] = torch.zeros(128, 96, 5, 5)
    broken["inception6a.branch1.conv.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"(?s)missing: inception5b.*shape: inception3a.*5, 5.*extra: inception6a"):
        inflate(models.build("i3d", num_classes=4), broken)


def test_gamma_other_than_one_needs_a_model_with_gamma(googlenet):
    scaled = {**googlenet, "conv2.bn.weight": torch.full((64,), 1.5)}
    with pytest.raises(ValueError, match=r"Conv3d_2b_1x1.bn.weight.*bn_gamma=True"):
        inflate(models.build("i3d", num_classes=4), scaled)
    model = models.build("i3d", num_classes=4, bn_gamma=True)
    inflate(model, scaled)
    assert model.trunk.Conv3d_2b_1x1.bn.weight.eq(1.5).all()


def test_a_model_without_inception_is_refused(googlenet):
    with pytest.raises(ValueError, match="C3D has no Inception-V1 trunk"):
        inflate(models.build("c3d", num_classes=4, width=0.0625, size=32), googlenet)
