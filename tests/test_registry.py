"""All five models by name: the paper's parameter counts and inputs, a training step, what is refused."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.cost import blank_clips, count_flops, count_parameters

SMALL = {
    "convnet_lstm": {"frames": 4, "test_frames": 6, "size": 64},
    "c3d": {"size": 64},
    "two_stream": {"size": 64},
    "fused_two_stream": {"size": 64, "snapshots": 2},
    "i3d": {"size": 64, "frames": 16, "test_frames": 24},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "streams", "count"),
    [
        ("convnet_lstm", ["rgb"], 8_946_624),
        ("c3d", ["rgb"], 79_645_520),
        ("two_stream", [None], 12_058_560),
        ("fused_two_stream", [None], 39_756_336),
        ("i3d", ["rgb", "flow"], 25_358_016),
    ],
)
def test_parameters_are_those_of_table_1(name, streams, count):
    with torch.device("meta"):
        built = [models.build(name, num_classes=400, stream=stream) for stream in streams]
    assert sum(count_parameters(model) for model in built) == count


@pytest.mark.parametrize(
    ("name", "train", "train_seconds", "test", "test_seconds"),
    [
        ("convnet_lstm", {"rgb": 25}, 5.0, {"rgb": 50}, 10.0),
        ("c3d", {"rgb": 16}, 0.64, {"rgb": 240}, 9.6),
        ("two_stream", {"rgb": 1, "flow": 10}, 0.4, {"rgb": 25, "flow": 250}, 10.0),
        ("fused_two_stream", {"rgb": 5, "flow": 50}, 2.0, {"rgb": 25, "flow": 250}, 10.0),
        ("i3d", {"rgb": 64}, 2.56, {"rgb": 250}, 10.0),
    ],
)
def test_contracts_are_the_inputs_of_table_1(name, train, train_seconds, test, test_seconds):
    with torch.device("meta"):
        input_spec = models.build(name, num_classes=400).input_spec
    for sampling, frames, seconds in ((input_spec.train, train, train_seconds), (input_spec.test, test, test_seconds)):
        assert {s: c.num_frames * sampling.num_clips for s, c in sampling.streams.items()} == frames
        assert sampling.seconds == pytest.approx(seconds)
        for stream in sampling.streams.values():
            assert stream.frame_indices(7)[-1] < 7 + sampling.span
    assert input_spec.shorter_side == {224: 256, 112: 128}[input_spec.size]


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_few_steps_on_small_clips_fit_the_labels(name):
    model = models.build(name, num_classes=3, width=0.125, dropout=0.0, bn_momentum=0.5, **SMALL[name])
    clips = blank_clips(model.input_spec.train, 64, batch=3)
    clips = {stream: torch.rand_like(clip) * 2 - 1 for stream, clip in clips.items()}
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        loss = models.cross_entropies(model(clips), labels).mean()
        loss.backward()
        optimizer.step()
    assert models.clip_scores(model(clips)).argmax(dim=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_test_video_of_the_contract_gives_scores(name):
    model = models.build(name, num_classes=3, width=0.0625, **SMALL[name]).eval()
    scores = models.clip_scores(model(blank_clips(model.input_spec.test, model.input_spec.size)))
    assert scores.shape == (1, 3)


def test_cross_entropy_is_taken_at_all_time_steps():
    logits, labels = torch.randn(2, 4, 5), torch.tensor([1, 3])
    each = [nn.functional.cross_entropy(logits[:, t], labels, reduction="none") for t in range(4)]
    torch.testing.assert_close(models.cross_entropies(logits, labels), torch.stack(each).mean(dim=0))
    assert torch.equal(models.clip_scores(logits), logits[:, 3])


def test_flops_of_i3d_and_of_its_test_video():
    assert count_flops(models.configure("i3d", num_classes=400)) / 1e9 == pytest.approx(222.3, abs=0.1)
    c3d = models.configure("c3d", num_classes=400)
    assert count_flops(c3d, test=True) == 15 * count_flops(c3d)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet", {}, "convnet_lstm, c3d, two_stream, fused_two_stream, i3d"),
        ("c3d", {"conv1_stride": 1}, "conv1_stride.*it has bn_momentum"),
        ("fused_two_stream", {"stream": "rgb"}, "stream"),
        ("i3d", {"width": 0.0}, "width is 0.0"),
        ("i3d", {"conv1_stride": 2.0}, "conv1_stride is 2.0; give a whole number"),
        ("convnet_lstm", {"frames": 0}, "frames is 0"),
        ("i3d", {"size": 16}, "at least 32"),
        ("i3d", {"dropout": 1.0}, "dropout is 1.0"),
        ("c3d", {"stream": "both"}, "'rgb' or 'flow'"),
    ],
)
def test_wrong_settings_say_what_is_allowed(name, settings, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, num_classes=5, **settings)


def test_models_import_nothing_but_torch_numpy_and_safetensors():
    allowed = {"torch", "numpy", "safetensors", "models"} | sys.stdlib_module_names
    for path in Path(models.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert {name.split(".")[0] for name in names} <= allowed, path


@torch.no_grad()
@pytest.mark.parametrize("name", ["c3d", "i3d"])
def test_models_are_captured_as_one_graph(name):
    model = models.build(name, num_classes=3, width=0.0625, **SMALL[name]).eval()
    clips = {s: torch.rand_like(c) for s, c in blank_clips(model.input_spec.train, model.input_spec.size).items()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(clips), model(clips))
