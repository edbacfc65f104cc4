"""The loop of a worker, in this process: where it stops before the schedule's end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train
import torch

from models.video_model import VideoModel
from pipelines.datasets.video_index import read_index
from pipelines.errors import DivergedError, OutputLockedError
from pipelines.lock import lock_output
from pipelines.training import trainer
from pipelines.training.config import Run, Scale
from pipelines.training.loop import train_worker
from pipelines.training.settings import PRESETS, prepare
from pipelines.training.trainer import begin_run, train
from pipelines.training.worker import Worker

SCALE = Scale(num_workers=1, use_gpu=False)


@pytest.fixture(autouse=True)
def _the_only_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(rank=0, num_workers=1, device=torch.device("cpu"), data_cpus=1.0)
    monkeypatch.setattr(Worker, "here", classmethod(lambda *_: worker))
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train, "report", lambda *_, **__: pytest.fail("a checkpoint was written"))


def prepare_run(motion_shards: str, learning_rate: float = 0.02) -> tuple[Run, VideoModel]:
    settings = PRESETS["debug"].change(
        network={"stream": "flow"},
        schedule={"steps": 4, "learning_rate": learning_rate},  # few: what is not taken is decoded for nobody
        reporting={"log_every": 2},
        splits={"validation_split": "none"},
    )
    return prepare(settings, read_index(motion_shards), SCALE)


def begin(output: Path, run: Run, model: VideoModel) -> Run:
    """The run, which has its weights."""
    begin_run(run, model, str(output))
    return run


def test_a_run_that_has_lost_its_lock_stops_and_writes_nothing(motion_shards: str, tmp_path: Path) -> None:
    """Ray's workers train on while their driver sleeps, and another run goes on from the same checkpoints."""
    run = begin(tmp_path, *prepare_run(motion_shards))
    with lock_output(str(tmp_path)) as lock:
        late = dataclasses.replace(lock.claim, token="of a run before")
        assert train_worker(run, str(tmp_path), SCALE, mailbox=None, claim=late) is None
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("tensorboard/*"))


def test_a_run_that_diverges_stops_with_the_reason_and_its_last_line(motion_shards: str, tmp_path: Path) -> None:
    run = begin(tmp_path, *prepare_run(motion_shards, learning_rate=1e30))
    reason = train_worker(run, str(tmp_path), SCALE, mailbox=None)
    assert reason is not None
    assert reason.startswith("by step 2 (8 clips)")
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["top1"] < 1


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_did_not_come_to_its_end_has_no_result(
    ray_here: None, motion_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Its workers stopped in good order: Ray Train knows of no error."""
    fitted = SimpleNamespace(return_value=None if lost else "by step 2 …")
    monkeypatch.setattr(trainer, "Trainer", lambda **_: SimpleNamespace(fit=lambda: fitted))
    error, words = (OutputLockedError, "taken over by another run") if lost else (DivergedError, "diverged: by step 2")
    with lock_output(str(tmp_path)) as lock:
        claim = dataclasses.replace(lock.claim, token="of a run before") if lost else lock.claim
        with pytest.raises(error, match=words):
            train(*prepare_run(motion_shards), str(tmp_path), SCALE, claim=claim)
    assert not (tmp_path / "result.json").exists()
