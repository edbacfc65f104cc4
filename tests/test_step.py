"""Steps of the optimizer on batches made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_runs import WORKER, make_batches, make_model, make_run

from models import cuda
from pipelines.training import step as step_module
from pipelines.training.state import TrainingState
from pipelines.training.step import TrainingStep, Waits

CPU = torch.device("cpu")


def take(size: int = 4, *, weight: float = 1.0, dropout: float = 0.5, **optimisation: Any) -> TrainingStep:
    """One step, and what it left."""
    run, model = make_run(**optimisation), make_model(dropout=dropout)
    step = TrainingStep(run, WORKER, TrainingState.build(model, run, CPU))
    step.take(make_batches(size, weight=weight))
    return step


def weights(step: TrainingStep) -> list[torch.Tensor]:
    return [weight.detach() for weight in step.state.model.parameters()]


def test_a_step_counts_its_clips_and_its_loss() -> None:
    step = take()
    sums = step.sums.reduce()
    assert (step.state.clips_seen, sums["clips"], sums["failed"]) == (4, 4, 0)
    assert sums["loss"] / 4 == pytest.approx(0.69, abs=0.7)
    assert 0 <= sums["waited"] <= sums["seconds"]


def test_accumulated_batches_make_one_step_of_all_their_clips() -> None:
    # Head only: batch norm, which sees each batch by itself, is in evaluation mode.
    frozen = {"dropout": 0.0, "train_only_head": True}
    whole, parts = take(4, **frozen), take(2, batch=2, accumulate=2, **frozen)
    assert whole.state.clips_seen == parts.state.clips_seen == 4
    for one, other in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_features_keep_their_statistics() -> None:
    step, fresh = take(train_only_head=True), make_model().state_dict()
    changed = {name for name, tensor in step.state.model.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert changed
    assert all("logits" in name for name in changed)


def test_clips_that_cannot_be_decoded_change_nothing_and_are_counted() -> None:
    step = take(weight=0.0, weight_decay=0.0)
    assert all(torch.equal(one, other) for one, other in zip(weights(step), make_model().parameters(), strict=True))
    assert step.sums.reduce()["failed"] == 4
    assert step.errors == ["v0: it is broken"] * 4


def test_a_clipped_gradient_has_the_norm_that_was_asked_for() -> None:
    step = take(clip_norm=1e-3)
    norms = [weight.grad.norm() for weight in step.state.model.parameters() if weight.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_dropout_follows_from_the_clips_seen() -> None:
    assert all(torch.equal(one, other) for one, other in zip(weights(take()), weights(take()), strict=True))


def take_recorded(monkeypatch: pytest.MonkeyPatch, record: Any, *, steps: int = 2, records: bool = True, **run: Any):
    """Steps where the network can be recorded, as on a GPU, and how often it was."""
    asked = []
    monkeypatch.setattr(cuda, "can_record", lambda device: True)
    monkeypatch.setattr(cuda, "record", lambda *arguments: asked.append(arguments) or record(*arguments))
    accumulate = run.get("accumulate", 1)
    state = TrainingState.build(make_model(), make_run(**run), CPU)
    step = TrainingStep(make_run(**run), WORKER, state, records=records)
    for number in range(steps):
        step.take(make_batches(4 // accumulate, first=4 * number))
    return step, len(asked)


def plain_record(model: Any, clips: Any, precision: str) -> Any:
    return model


def test_a_network_is_recorded_once_and_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, times = take_recorded(monkeypatch, plain_record)
    plain, never = take_recorded(monkeypatch, plain_record, records=False)
    assert (times, never) == (1, 0)
    assert all(torch.equal(one, other) for one, other in zip(weights(recorded), weights(plain), strict=True))


def test_accumulated_gradients_are_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_recorded(monkeypatch, plain_record, batch=2, accumulate=2)[1] == 0


def test_what_cannot_be_recorded_is_said_once_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(step_module.logger, "warning", lambda text, *words: said.append(text % words))

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    failed, times = take_recorded(monkeypatch, fail)
    plain, _ = take_recorded(monkeypatch, plain_record, records=False)
    assert times == 1
    assert [text.partition(": ")[2] for text in said] == ["operation not permitted when stream is capturing"]
    assert all(torch.equal(one, other) for one, other in zip(weights(failed), weights(plain), strict=True))


class Mark:
    """An event of a GPU: when it comes to it, by a clock that the test turns."""

    clock = 0.0

    def __init__(self) -> None:
        self.at, self.waited_for = Mark.clock, 0

    def synchronize(self) -> None:
        self.waited_for += 1

    def elapsed_time(self, later: Mark) -> float:
        return 1000 * (later.at - self.at)


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[Mark]:
    made: list[Mark] = []
    monkeypatch.setattr(step_module, "_mark", lambda: made.append(Mark()) or made[-1])
    return made


def fetch_at(waits: Waits, idle: float, begins: float) -> None:
    """A batch that is asked for while the GPU is busy until `idle`, and there when it is `begins` on the GPU."""
    Mark.clock = idle
    waits.fetch(make_batches())
    Mark.clock = begins
    waits.begin_batch()


def test_a_gpu_waits_while_it_has_no_clips(marks: list[Mark]) -> None:
    waits, waited = Waits(torch.device("cuda")), []
    for idle, begins in ((0, 3), (13, 13), (23, 28)):
        fetch_at(waits, idle, begins)
        waited.append(waits.take())
    assert waited == [3, 0, 5]
    assert [mark.waited_for for mark in marks] == [0, 1] * 3  # no step is launched before the one before has begun


def test_each_batch_of_an_accumulated_step_is_waited_for(marks: list[Mark]) -> None:
    waits = Waits(torch.device("cuda"))
    fetch_at(waits, 0, 1)
    fetch_at(waits, 11, 13)
    assert waits.take() == 1 + 2
    assert [mark.waited_for for mark in marks] == [0, 1] * 2


def test_what_a_gpu_does_between_two_steps_is_no_waiting(marks: list[Mark]) -> None:
    """A validation, of 60 s."""
    waits = Waits(torch.device("cuda"))
    fetch_at(waits, 0, 1)
    assert waits.take() == 1
    fetch_at(waits, 10 + 60, 10 + 60 + 2)
    assert waits.take() == 2
