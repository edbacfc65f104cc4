"""Ray Train, less what it starts that no training of ours uses. Each process takes seconds before the first step.

Its controller unpickles the configuration of its backend, and Ray's own for torch imports torch there: the one here
imports it in the workers alone, which are the same process group. And with no Ray Dataset given to the trainer there is
nothing that an actor for datasets would hand out: workers read their clips by `pipelines.clips.loader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.garbage import collect_seldom

JOIN_TIMEOUT = timedelta(minutes=30)  # Ray's own
LEAVE_TIMEOUT_S = 30.0  # a worker that hangs is killed after that, with its process group


@dataclass(frozen=True)
class ProcessGroup(BackendConfig):
    """Workers as a process group of torch.distributed: NCCL between GPUs, else Gloo; one worker alone needs none."""

    use_gpu: bool

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train's controller calls."""
        return _Processes


class _Processes(Backend):
    share_cuda_visible_devices = True  # as NCCL wants it between the GPUs of one node

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have each worker join, once all of them are there."""
        size = len(worker_group)
        if size == 1:
            return
        address, port = worker_group.execute_single(0, get_address_and_port)
        host = f"[{address}]" if ":" in address else address
        told = (f"tcp://{host}:{port}", size, backend_config.use_gpu)
        ray.get([worker_group.execute_single_async(rank, _join, rank, *told) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have each worker leave; one that cannot any more is not waited for."""
        if len(worker_group) > 1:
            ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=LEAVE_TIMEOUT_S)


def _join(rank: int, url: str, size: int, use_gpu: bool) -> None:
    import torch.distributed

    name = "nccl" if use_gpu else "gloo"
    torch.distributed.init_process_group(name, init_method=url, rank=rank, world_size=size, timeout=JOIN_TIMEOUT)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_worker(told: dict[str, Any]) -> Any:
    """What each worker of a training runs: `train_worker` of the arguments that `told` refers to.

    They come by reference, and the import is in here: Ray Train's controller, which unpickles this, needs neither torch
    nor the networks.
    """
    collect_seldom()
    from pipelines.training.loop import train_worker

    return train_worker(**ray.get(told["arguments"]))


class Trainer(DataParallelTrainer):
    """Ray's data-parallel trainer, of workers that read their own data; without its `cleaner` where that is False."""

    def __init__(self, *, cleaner: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.left_out = (DatasetsCallback,) if cleaner else (DatasetsCallback, PlacementGroupCleanerCallback)

    def _create_default_callbacks(self) -> list[Any]:
        return [kept for kept in super()._create_default_callbacks() if not isinstance(kept, self.left_out)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """None: a Ctrl-C is a KeyboardInterrupt, as in all jobs. Ray's handler would end the process without a word."""
