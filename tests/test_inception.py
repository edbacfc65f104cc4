"""The one table of Inception-V1, framewise and inflated."""

from __future__ import annotations

import pytest
import torch

from models.inception import ENDPOINTS, FRAMEWISE, InceptionV1, TemporalExtents, UnitFactory, count_time_steps


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_channels_and_grid_of_every_endpoint():
    with torch.device("meta"):
        trunk = InceptionV1(3, unit=UnitFactory(), temporal=TemporalExtents())
    shapes = {}
    for name, layer in trunk.named_children():
        layer.register_forward_hook(lambda _, args, y, name=name: shapes.update({name: tuple(y.shape[1:4])}))
    trunk(torch.zeros(1, 3, 64, 224, 224, device="meta"))
    assert tuple(shapes) == ENDPOINTS
    assert list(shapes.values()) == [
        *[(64, 32, 112), (64, 32, 56), (64, 32, 56), (192, 32, 56), (192, 32, 28), (256, 32, 28), (480, 32, 28)],
        *[(480, 16, 14), (512, 16, 14), (512, 16, 14), (512, 16, 14), (528, 16, 14), (832, 16, 14)],
        *[(832, 8, 7), (832, 8, 7), (1024, 8, 7)],
    ]


def test_framewise_trunk_sees_each_frame_alone():
    trunk = InceptionV1(3, unit=UnitFactory(width=0.125)).eval()
    clip = torch.randn(1, 3, 3, 64, 64)
    alone = torch.cat([trunk(clip[:, :, t : t + 1]) for t in range(3)], dim=2)
    torch.testing.assert_close(trunk(clip), alone)


def test_inflated_trunk_sees_its_neighbours():
    trunk = InceptionV1(3, unit=UnitFactory(width=0.125), temporal=TemporalExtents()).eval()
    clip = torch.randn(1, 3, 16, 64, 64)
    changed = clip.clone()
    changed[:, :, 15] = 0
    assert not torch.equal(trunk(clip)[:, :, 0], trunk(changed)[:, :, 0])


def test_trunk_has_57_units_and_no_gamma_unless_asked():
    with torch.device("meta"):
        plain = InceptionV1(3, unit=UnitFactory())
        scaled = InceptionV1(3, unit=UnitFactory(bn_gamma=True))
    assert sum(name.endswith("conv.weight") for name in plain.state_dict()) == 57
    assert len(scaled.state_dict()) - len(plain.state_dict()) == 57


def test_weights_are_drawn_as_sonnet_does():
    trunk = InceptionV1(3, unit=UnitFactory())
    weight = trunk.Mixed_3b.Branch_1.Conv3d_0b_3x3.conv.weight
    std = 1 / (96 * 9) ** 0.5
    assert weight.abs().max() <= 2 * std
    assert weight.std().item() == pytest.approx(0.88 * std, rel=0.02)  # of a normal truncated at two deviations


def test_unknown_endpoint_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'Mixed_9z'.*Conv3d_1a_7x7.*Mixed_5c"):
        InceptionV1(3, unit=UnitFactory(width=0.125))(torch.zeros(1, 3, 1, 32, 32), "Mixed_9z")


def test_time_steps_follow_the_strides():
    assert set(count_time_steps(FRAMEWISE.strides(), 5).values()) == {5}
    assert count_time_steps(TemporalExtents().strides(), 79)["Mixed_5c"] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pool_kernels": (1, 1, 3)}, "MaxPool3d_5a_2x2"), ({"conv1_stride": 0}, "below 1")],
)
def test_impossible_extents_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TemporalExtents(**settings)
