"""Released weights under each of their names: every tensor lands, and the logits are the plain build's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from i3d_reference import reference_logits, released_variables
from tensorflow_checkpoint_writer import write_checkpoint

from models.pretrained import from_tensors, load_released


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def rgb():
    return released_variables(3)


@pytest.fixture(scope="module")
def flow():
    return released_variables(2, seed=1)


def as_kinetics_400(variables, prefix):
    return {f"{prefix}/inception_i3d/{name}": tensor for name, tensor in variables.items()}


def as_kinetics_600(variables):
    shaped = {n: t if "conv_3d" in n else t.reshape(1, 1, 1, 1, -1) for n, t in variables.items()}
    trained = [name for name in shaped if "moving" not in name]
    return {**shaped, **{f"{name}/Momentum": torch.full_like(shaped[name], 9.0) for name in trained}}


PIERGIAJ_BRANCHES = {
    **{"Branch_0/Conv3d_0a_1x1": "b0", "Branch_1/Conv3d_0a_1x1": "b1a", "Branch_1/Conv3d_0b_3x3": "b1b"},
    **{"Branch_2/Conv3d_0a_1x1": "b2a", "Branch_2/Conv3d_0b_3x3": "b2b", "Branch_2/Conv3d_0a_3x3": "b2b"},
    "Branch_3/Conv3d_0b_1x1": "b3b",
}
HASSONY2_BRANCHES = {
    **{"Branch_0/Conv3d_0a_1x1": "branch_0", "Branch_1/Conv3d_0a_1x1": "branch_1.0"},
    **{"Branch_1/Conv3d_0b_3x3": "branch_1.1", "Branch_2/Conv3d_0a_1x1": "branch_2.0"},
    **{"Branch_2/Conv3d_0b_3x3": "branch_2.1", "Branch_2/Conv3d_0a_3x3": "branch_2.1"},
    "Branch_3/Conv3d_0b_1x1": "branch_3.1",
}
TORCH_TENSORS = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def as_port(variables, *, branches, norm, logits, lower):
    """A PyTorch port's state dict, spelled from DeepMind's names by table."""
    state = {}
    for name, tensor in variables.items():
        unit, layer, kind = name.rsplit("/", 2)
        block, _, branch = unit.partition("/")
        path = f"{block.lower() if lower else block}.{branches[branch]}" if block.startswith("Mixed") else block
        path = logits if block == "Logits" else path
        path = path[0].lower() + path[1:] if lower else path
        if layer == "conv_3d":
            state[f"{path}.conv3d.{'bias' if kind == 'b' else 'weight'}"] = (
                tensor if kind == "b" else tensor.permute(4, 3, 0, 1, 2).contiguous()
            )
        else:
            state[f"{path}.{norm}.{TORCH_TENSORS[kind]}"] = tensor
            state[f"{path}.{norm}.weight"] = torch.ones_like(tensor)
            state[f"{path}.{norm}.num_batches_tracked"] = torch.tensor(0)
    return state


def as_piergiaj(variables):
    return as_port(variables, branches=PIERGIAJ_BRANCHES, norm="bn", logits="logits", lower=False)


def as_hassony2(variables):
    return as_port(variables, branches=HASSONY2_BRANCHES, norm="batch3d", logits="conv3d_0c_1x1", lower=True)


@torch.no_grad()
def assert_computes(model, variables, stream):
    clip = torch.rand(1, {"rgb": 3, "flow": 2}[stream], 16, 64, 64) * 2 - 1
    torch.testing.assert_close(model.eval()(clip), reference_logits(variables, clip), atol=2e-5, rtol=0)
    assert model.config.stream == stream


def assert_every_tensor_landed(model, variables):
    """Each value of the file is in the model once: 57 × 4 + 2 tensors, compared as sorted fingerprints."""
    ours = [t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")]
    assert len(ours) == len(variables) == 230
    assert sorted(t.double().sum().item() for t in ours) == pytest.approx(
        sorted(t.double().sum().item() for t in variables.values()), abs=1e-9
    )


def test_deepmind_kinetics_400_rgb(tmp_path, rgb):
    write_checkpoint(tmp_path / "model.ckpt", as_kinetics_400(rgb, "RGB"))
    model = load_released(tmp_path, stream="rgb")
    assert_every_tensor_landed(model, rgb)
    assert_computes(model, rgb, "rgb")


def test_deepmind_kinetics_400_flow(tmp_path, flow):
    write_checkpoint(tmp_path / "model.ckpt", as_kinetics_400(flow, "Flow"))
    model = load_released(tmp_path / "model.ckpt")
    assert_every_tensor_landed(model, flow)
    assert_computes(model, flow, "flow")


def test_deepmind_kinetics_600(tmp_path):
    variables = released_variables(3, num_classes=600, seed=2)
    stored = as_kinetics_600(variables)
    assert len(stored) == 346
    write_checkpoint(tmp_path / "model.ckpt", stored)
    model = load_released(tmp_path / "model.ckpt.index")
    assert model.config.num_classes == 600
    assert_every_tensor_landed(model, variables)
    assert_computes(model, variables, "rgb")


@pytest.mark.parametrize(("spell", "file"), [(as_piergiaj, "imagenet.pt"), (as_hassony2, "model.pth")])
@pytest.mark.parametrize("stream", ["rgb", "flow"])
def test_pytorch_ports(tmp_path, request, spell, file, stream):
    variables = request.getfixturevalue(stream)
    legacy = spell is as_piergiaj  # its files date from before PyTorch's zip format
    torch.save(spell(variables), tmp_path / file, _use_new_zipfile_serialization=not legacy)
    model = load_released(tmp_path / file, stream=stream)
    assert_every_tensor_landed(model, variables)
    assert_computes(model, variables, stream)


def test_trained_gamma_is_kept(rgb):
    state = as_piergiaj(rgb)
    state["Mixed_3b.b1a.bn.weight"] *= 2
    model = from_tensors(state)
    assert model.config.bn_gamma
    assert model.trunk.Mixed_3b.Branch_1.Conv3d_0a_1x1.bn.weight.eq(2).all()
    with pytest.raises(ValueError, match="bn_gamma=True"):
        from_tensors(state, bn_gamma=False)


def test_settings_reach_the_model(rgb):
    model = from_tensors(rgb, dropout=0.1, pool_strides=(1, 1, 1, 1), bn_momentum=0.1)
    assert (model.config.dropout, model.config.pool_strides) == (0.1, (1, 1, 1, 1))


def test_one_error_lists_all_that_does_not_fit(rgb):
    broken = dict(rgb)
    del broken["Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w"], broken["Logits/Conv3d_0c_1x1/conv_3d/b"]
    broken["Conv3d_2b_1x1/conv_3d/w"] = torch.zeros(1, 1, 1, 64, 65)
    broken["Mixed_6a/conv_3d/w"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        from_tensors(broken)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["missing", "missing", "shape", "extra"]
    assert "Mixed_5b/Branch_2/Conv3d_0a_3x3" in str(error.value)
    assert "(65, 64, 1, 1, 1)" in str(error.value)


def test_the_other_stream_is_refused(flow):
    with pytest.raises(ValueError, match="weights of the flow stream; asked for was stream='rgb'"):
        from_tensors(flow, stream="rgb")


def test_unknown_names_and_absent_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer1.*Conv3d_1a_7x7"):
        from_tensors({"layer1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="neither a file"):
        load_released(tmp_path / "rgb_imagenet.pt")


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"Conv3d_1a_7x7.conv3d.weight": Trap()}, tmp_path / "rgb_imagenet.pt")
    with pytest.raises(ValueError, match="pickled code"):
        load_released(tmp_path / "rgb_imagenet.pt")
    assert not Path("sprung").exists()
