"""Curves of a training in MLflow (its library, on a database of its own) and in W&B (a stand-in for its library)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.errors import SettingsError
from pipelines.training import tracking
from pipelines.training.tracking import TrackerName, track

RUN = {"seed": 0, "model": {"name": "i3d", "classes": list(range(900))}}
LINES = [
    {"kind": "train", "time": 1.0, "step": 20, "loss": 0.5, "errors": ["v1: broken"]},
    {"kind": "validation", "time": 2.0, "step": 20, "val_top1": 0.25},
]
AGAIN = {"kind": "train", "time": 3.0, "step": 40, "loss": 0.25}


def follow(name: TrackerName, *lines: dict[str, Any], stopped: bool = False) -> None:
    with track(name, "s3://bucket/it's a run", RUN) as send:
        for line in lines:
            send(line)
        if stopped:
            raise KeyboardInterrupt


def test_a_resumed_training_goes_on_in_its_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        follow("mlflow", *LINES, stopped=True)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("two-stream-i3d").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["KILLED"]
    follow("mlflow", AGAIN)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "i3d"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(20, 0.5), (40, 0.25)]
    assert run.data.metrics == {"train/loss": 0.25, "validation/val_top1": 0.25}


def test_a_training_in_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    run = SimpleNamespace(
        define_metric=lambda *names, **options: said.append((names, options)),
        log=said.append,
        finish=lambda **options: said.append(options),
    )
    wandb = SimpleNamespace(init=lambda **options: said.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    follow("wandb", *LINES)
    begun, *rest = said
    assert (begun["project"], begun["name"], begun["resume"]) == ("two-stream-i3d", "s3://bucket/it's a run", "allow")
    assert begun["id"].isalnum()
    assert rest == [
        (("*",), {"step_metric": "step"}),
        {"train/loss": 0.5, "step": 20},
        {"validation/val_top1": 0.25, "step": 20},
        {"exit_code": 0},
    ]


def test_a_server_that_goes_away_costs_points_and_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []  # not caplog: what other tests import configures logging anew
    monkeypatch.setattr(tracking.logger, "warning", lambda text, error: warned.append(text % error))

    def refuse(*given: Any, **options: Any) -> None:
        raise RuntimeError("503")

    run = SimpleNamespace(define_metric=lambda *names, **options: None, log=refuse, finish=refuse)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    follow("wandb", *LINES)
    assert warned == ["the tracker took nothing this time: 503"] * 3
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(SettingsError, match="--tracker wandb: no run could be opened: 503"):
        follow("wandb")


def test_a_server_that_keeps_its_caller_waiting_is_not_asked_at_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], []
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def time_out(values: dict[str, Any]) -> None:
        asked.append(values["step"])
        clock[0] += 240  # MLflow's seven tries
        raise TimeoutError("no answer")

    run = SimpleNamespace(define_metric=lambda *names, **options: None, log=time_out, finish=lambda **options: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    with track("wandb", "out/run", RUN) as send:
        for step in range(1_000):
            clock[0] += 1
            send({"kind": "train", "step": step, "loss": 0.5})
    assert asked == [0]
    assert clock[0] < 1_300
    with track("wandb", "out/run", RUN) as send:
        send({"kind": "train", "step": 0, "loss": 0.5})
        clock[0] += 2_401
        send({"kind": "train", "step": 20, "loss": 0.5})
    assert asked == [0, 0, 20]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_whose_package_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, name: TrackerName) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingsError, match=rf"--tracker {name} needs its package: pip install -e '.\[{name}\]'"):
        follow(name)


@pytest.mark.parametrize("name", ["tensorboard", "none"])
def test_without_a_server_nothing_is_sent(name: TrackerName) -> None:
    follow(name, *LINES)
