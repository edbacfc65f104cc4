"""The folded copy of each model gives the model's logits."""

from __future__ import annotations

import pytest
import torch
from test_registry import SMALL

import models
from models.cost import blank_clips
from models.folding import FoldedUnit, fold_batch_norm


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def trained_like(name, **settings):
    """A small model whose running statistics, offsets and gammas are not the initial ones."""
    model = models.build(name, num_classes=10, width=0.25, **SMALL[name], **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.4, 0.8)
            torch.nn.init.uniform_(module.bias, -0.2, 0.4)
            if module.weight is not None:
                torch.nn.init.uniform_(module.weight, 0.8, 1.2)
    return model.eval()


def random_clips(model, batch=2):
    clips = blank_clips(model.input_spec.train, model.input_spec.size, batch=batch)
    return {stream: torch.rand_like(clip) * 2 - 1 for stream, clip in clips.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("batch", [1, 2])
def test_folded_logits_are_the_same_in_fp32(name, batch):
    model = trained_like(name)
    clips = random_clips(model, batch)
    logits = model(clips)
    assert logits.std() > 0.02
    torch.testing.assert_close(fold_batch_norm(model)(clips), logits, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", models.CONFIGS)
def test_folded_logits_are_close_in_bf16(name):
    model = trained_like(name)
    clips = random_clips(model)
    logits = model(clips)
    error = (fold_batch_norm(model, dtype=torch.bfloat16)(clips) - logits).norm() / logits.norm()
    assert error < 0.05


@torch.no_grad()
def test_folding_leaves_the_model_as_it_was_and_holds_gamma():
    model = trained_like("i3d", bn_gamma=True)
    clips = random_clips(model)
    before = model(clips)
    folded = fold_batch_norm(model.train())
    assert model.training
    assert not any(isinstance(module, FoldedUnit) for module in model.modules())
    torch.testing.assert_close(folded(clips), before, atol=2e-5, rtol=0)


@torch.no_grad()
def test_unpacked_folding_is_exact_in_fp64():
    model = trained_like("i3d").double()
    clip = torch.rand(1, 3, 16, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model, dtype=torch.float64)(clip), model(clip))
