"""Which worker a process is: its rank, device and part of the CPUs."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import ray
import ray.train
import ray.train.torch
import torch

from pipelines.training.config import Scale
from pipelines.training.ray_train import Trainer
from pipelines.training.worker import Worker, count_data_cpus


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_a_worker_computes_on_its_own_gpu_of_those_that_its_node_s_workers_share(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: list[str]
) -> None:
    """Kernels are launched on the current device, which is the first one unless it is chosen in this very thread."""
    context = SimpleNamespace(get_world_size=lambda: 2, get_world_rank=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device(device))
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    worker = Worker.here(Scale(num_workers=2, use_gpu=device != "cpu"))
    assert (worker.rank, worker.num_workers, str(worker.device), worker.data_cpus) == (1, 2, device, 3.0)
    assert current == chosen


def test_ctrl_c_in_a_training_is_left_to_the_job_as_in_all_jobs() -> None:
    """Ray Train's own handler exits with 1 and says nothing, where jobs say that the same command goes on."""
    before = signal.getsignal(signal.SIGINT)
    try:
        Trainer._register_sigint_handler(SimpleNamespace(), controller=None)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


def test_workers_share_the_cpus_that_none_has_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert count_data_cpus(Scale(num_workers=2, cpus_per_worker=0.5), 2) == 0.5
    assert count_data_cpus(Scale(num_workers=2, cpus_per_worker=1.0), 2) == 0
    assert count_data_cpus(Scale(num_workers=4, data_cpus=1.0), 2) == 0.5
