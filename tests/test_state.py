"""The state of a training: whole from the beginning, and the same after it was saved and loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training_runs import WORKER, make_batches, make_model, make_run

from models import checkpoint
from pipelines.training.state import TrainingState, batch_norms, count_clips_seen, read_saved
from pipelines.training.step import TrainingStep

CPU = torch.device("cpu")


def trained(steps: int = 1) -> TrainingState:
    run = make_run()
    state = TrainingState.build(make_model(), run, CPU)
    step, batches = TrainingStep(run, WORKER, state), make_batches()
    for _ in range(steps):
        step.take(batches)
    return state


def test_a_state_begins_with_the_initial_weights_of_a_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make_model(), make_run().metadata())
    state = TrainingState.load(str(tmp_path), read_saved(str(tmp_path)), make_run(), CPU)
    assert state.clips_seen == count_clips_seen(read_saved(str(tmp_path))) == 0
    assert state.optimizer.state_dict()["state"] == {}
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), make_model().parameters(), strict=True))


def test_a_loaded_state_takes_the_steps_that_the_saved_one_would_have_taken(tmp_path: Path) -> None:
    run, before = make_run(), trained(2)
    before.save(str(tmp_path), run.metadata())
    after = TrainingState.load(str(tmp_path), read_saved(str(tmp_path)), run, CPU)
    assert after.clips_seen == before.clips_seen == count_clips_seen(read_saved(str(tmp_path))) == 8
    for state in (before, after):
        TrainingStep(run, WORKER, state).take(make_batches(first=8))
    found, expected = after.model.state_dict(), before.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_the_head_is_trained_where_asked_for() -> None:
    run = make_run(train_only_head=True)
    state = TrainingState.build(make_model(), run, CPU)
    names = {name for name, weight in state.model.named_parameters() if weight.requires_grad}
    assert names
    assert all("logits" in name for name in names)


@pytest.mark.parametrize("what", ["weight", "statistic"])
def test_one_number_that_is_none_shows(what: str) -> None:
    state = trained()
    assert state.is_finite()
    norm = batch_norms(state.model)[3]
    tensor = norm.bias if what == "weight" else norm.running_var
    assert tensor is not None
    tensor.data[0] = math.nan if what == "weight" else math.inf
    assert not state.is_finite()
