"""What a training says: metrics worked out by hand, the names of checkpoints, and when it says that it cannot go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from training_runs import WORKER, make_batches, make_model, make_run

from pipelines.training.log import TrainingLog
from pipelines.training.report import describe_steps, report_checkpoint
from pipelines.training.state import TrainingState
from pipelines.training.step import TrainingStep


def begin(**optimisation: Any) -> TrainingStep:
    run = make_run(**optimisation)
    return TrainingStep(run, WORKER, TrainingState.build(make_model(), run, torch.device("cpu")))


def test_metrics_are_of_the_steps_since_the_last_time() -> None:
    step, batches = begin(), make_batches()
    for number in (1, 2):
        step.take(batches)
        metrics = describe_steps(step.run, WORKER, step, step_number=number)
        assert (metrics["step"], metrics["clips"], metrics["epoch"]) == (number, 4 * number, number)
        assert metrics["learning_rate"] == 0.1
        assert 0 < metrics["loss"] < 10
        assert "errors" not in metrics


def test_steps_on_nothing_end_the_run_with_the_reason() -> None:
    step = begin()
    step.take(make_batches(weight=0.0))
    with pytest.raises(RuntimeError, match="none of the last 4 clips could be decoded: v0: it is broken"):
        describe_steps(step.run, WORKER, step, step_number=1)


def test_the_same_step_number_on_more_workers_is_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 100 on 4 workers and on 8: by that name Ray Train would delete the newer one as replaced by itself."""
    named = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **saved: named.append(saved["checkpoint_dir_name"]))
    run, state = make_run(), begin().state
    with TrainingLog(str(tmp_path), None, clips_seen=0) as log:
        for clips_seen in (1_600, 3_200):
            report_checkpoint(run, WORKER, replace(state, clips_seen=clips_seen), log, step_number=100)
    assert named == ["clips-000001600", "clips-000003200"]
    assert not [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if json.loads(line)]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_event_files_are_written_where_they_are_wanted(tmp_path: Path, tensorboard: bool) -> None:
    with TrainingLog(str(tmp_path), None, clips_seen=0, tensorboard=tensorboard) as log:
        log.add("train", {"step": 1, "clips": 4, "loss": 0.5})
    assert len(list(tmp_path.glob("tensorboard/events.*"))) == tensorboard
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
