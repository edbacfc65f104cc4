"""A checkpoint directory rebuilds its model and says what it holds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from test_registry import SMALL

import models
from models.checkpoint import Metadata, load, load_training_state, save
from models.cost import blank_clips

TWO = Metadata(classes=("a", "b"))
CLIPS = {"resize": "square", "flow_bound": 8.0, "short_side": 96}
FLOW = {"bound": 20.0, "levels": 1024, "zero": 512}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize("name", models.CONFIGS)
def test_every_model_comes_back(tmp_path, name):
    model = models.build(name, num_classes=3, width=0.125, **SMALL[name])
    told = Metadata(classes=("a", "b", "ç"), flow_convention=FLOW, clips=CLIPS, extra={"step": 7})
    save(tmp_path / "new" / "checkpoint", model, told)
    again, metadata = load(tmp_path / "new" / "checkpoint")
    assert again.config == model.config
    assert metadata == told
    clips = {s: torch.rand_like(c) for s, c in blank_clips(model.input_spec.train, model.input_spec.size).items()}
    assert torch.equal(again.eval()(clips), model.eval()(clips))


def test_temporal_settings_come_back(tmp_path):
    settings = {"stream": "flow", "conv1_stride": 1, "pool_strides": (1, 2, 2, 2), "bn_gamma": True}
    model = models.build("i3d", num_classes=2, width=0.125, **SMALL["i3d"], **settings)
    save(tmp_path, model, TWO)
    assert load(tmp_path)[0].config == model.config


def test_files_are_readable_without_this_code(tmp_path):
    save(tmp_path, models.build("i3d", num_classes=2, width=0.125), TWO)
    described = json.loads((tmp_path / "model.json").read_text())
    assert (described["model"], described["config"]["frames"], described["format"]) == ("i3d", 64, 1)
    with safe_open(tmp_path / "weights.safetensors", framework="np") as weights:
        assert weights.get_tensor("trunk.Conv3d_1a_7x7.conv.weight").shape == (8, 3, 7, 7, 7)


def test_training_state_is_apart_and_optional(tmp_path):
    model = models.build("i3d", num_classes=2, width=0.0625, **SMALL["i3d"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 3, 16, 64, 64)).sum().backward()
    optimizer.step()
    save(tmp_path, model, TWO, training_state={"optimizer": optimizer.state_dict(), "step": 3})
    state = load_training_state(tmp_path)
    assert state["step"] == 3
    torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9).load_state_dict(state["optimizer"])
    save(tmp_path, model, TWO)
    assert load_training_state(tmp_path) is None


def test_wrong_directories_and_classes_are_refused(tmp_path):
    model = models.build("i3d", num_classes=2, width=0.0625)
    with pytest.raises(ValueError, match="3 class names for a model of 2 classes"):
        save(tmp_path, model, Metadata(classes=("a", "b", "c")))
    with pytest.raises(ValueError, match=r"no model\.json"):
        load(tmp_path)
    (tmp_path / "model.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        load(tmp_path)
