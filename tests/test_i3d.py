"""I3D against a plain second build of it, its gradients, its time axis, its features."""

from __future__ import annotations

import pytest
import torch
from i3d_reference import reference_logits, released_variables

from models import build, configure
from models.i3d import time_steps
from models.inception import ENDPOINTS
from models.pretrained import from_tensors


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def released():
    variables = released_variables(3)
    return variables, from_tensors(variables).eval()


@pytest.mark.parametrize("size", [(16, 64, 64), (17, 65, 51), (18, 36, 35)])
@torch.no_grad()
def test_logits_equal_the_plain_build(released, size):
    variables, model = released
    clip = torch.rand(2, 3, *size) * 2 - 1
    expected = reference_logits(variables, clip)
    assert expected.abs().max() > 1
    torch.testing.assert_close(model(clip), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("frames", [23, pytest.param(79, marks=pytest.mark.soak)])
def test_logits_equal_the_plain_build_at_paper_size(released, frames):
    variables, model = released
    clip = torch.rand(1, 3, frames, 224, 224) * 2 - 1
    torch.testing.assert_close(model(clip), reference_logits(variables, clip), atol=2e-5, rtol=0)


def test_gradients_equal_the_plain_build_in_fp64():
    variables = {name: v.double().requires_grad_() for name, v in released_variables(2, num_classes=5).items()}
    model = from_tensors({name: v.detach() for name, v in variables.items()}, dropout=0.0).double().train()
    clip, labels = torch.rand(2, 2, 16, 32, 32, dtype=torch.float64) * 2 - 1, torch.tensor([0, 3])
    torch.nn.functional.cross_entropy(reference_logits(variables, clip, training=True), labels).backward()
    torch.nn.functional.cross_entropy(model(clip), labels).backward()
    for unit, ours in (
        ("Conv3d_1a_7x7", "Conv3d_1a_7x7"),
        ("Mixed_5b/Branch_2/Conv3d_0a_3x3", "Mixed_5b.Branch_2.Conv3d_0b_3x3"),
    ):
        conv = model.trunk.get_submodule(ours).conv
        expected = variables[f"{unit}/conv_3d/w"].grad.permute(4, 3, 0, 1, 2)
        torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
    expected = variables["Mixed_3b/Branch_3/Conv3d_0b_1x1/batch_norm/beta"].grad
    torch.testing.assert_close(
        model.trunk.Mixed_3b.Branch_3.Conv3d_0b_1x1.bn.bias.grad, expected, rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize(("frames", "at_5c", "at_logits"), [(64, 8, 7), (79, 10, 9), (250, 32, 31), (16, 2, 1)])
def test_time_steps_of_the_paper(frames, at_5c, at_logits):
    steps = time_steps(configure("i3d", num_classes=400), frames)
    assert (steps["Mixed_5c"], steps["Logits"]) == (at_5c, at_logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"conv1_kernel": 3, "conv1_stride": 1},
        {"pool_kernels": (3, 3, 3, 3), "pool_strides": (2, 2, 2, 1)},
        {"pool_kernels": (1, 1, 1, 1), "pool_strides": (1, 1, 1, 1), "mixed_pool_kernel": 1},
        {"pool_kernels": (2, 4, 1, 2), "pool_strides": (1, 1, 2, 2), "conv1_kernel": 4},
    ],
)
@torch.no_grad()
def test_every_layer_has_the_time_steps_foretold(settings):
    model = build(
        "i3d", num_classes=3, width=0.125, frames=18, test_frames=18, size=32, logits_pool=1, **settings
    ).eval()
    clip = torch.zeros(1, 3, 18, 32, 32)
    found = {name: model.features(clip, name).shape[2] for name in ENDPOINTS}
    assert found | {"Logits": found["Mixed_5c"]} == time_steps(model.config, 18)
    assert model(clip).shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        ({"frames": 8}, "Logits"),
        ({"frames": 16, "pool_strides": (2, 2, 2, 2)}, "MaxPool3d_5a_2x2"),
        ({"frames": 4, "pool_strides": (2, 2, 2, 1)}, "MaxPool3d_3a_3x3"),
        ({"frames": 1}, "Conv3d_1a_7x7"),
    ],
)
def test_settings_that_leave_no_time_name_the_layer(settings, layer):
    with pytest.raises(ValueError, match=f"^{layer} leaves no time steps"):
        configure("i3d", num_classes=3, **settings)


def test_too_short_a_clip_names_the_layer():
    with pytest.raises(ValueError, match="Logits leaves no time steps: 1 of the clip's 8"):
        build("i3d", num_classes=3, width=0.125, frames=16)(torch.zeros(1, 3, 8, 32, 32))


@torch.no_grad()
def test_features_by_name_and_pooled(released):
    _, model = released
    clip = torch.rand(1, 3, 16, 64, 64)
    assert model.features(clip, "Mixed_4f").shape == (1, 832, 4, 4, 4)
    features = model.pooled_features(clip)
    assert features.shape == (1, 1024)
    torch.testing.assert_close(features, model.features(clip).mean(dim=(2, 3, 4)))  # two steps: one window


def test_a_wrong_stream_is_named():
    model = build("i3d", num_classes=3, stream="flow", width=0.125)
    with pytest.raises(ValueError, match=r"flow clip is \(B, 2, T, H, W\)"):
        model(torch.zeros(1, 3, 16, 64, 64))
    with pytest.raises(ValueError, match="needs 'flow'"):
        model({"rgb": torch.zeros(1, 3, 16, 64, 64)})
    with pytest.raises(ValueError, match="'rgb' or 'flow'"):
        build("i3d", num_classes=3, stream="audio")


def test_unscaled_bytes_are_refused():
    model = build("i3d", num_classes=3, width=0.125)
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\]; got torch.uint8"):
        model(torch.zeros(1, 3, 16, 64, 64, dtype=torch.uint8))
