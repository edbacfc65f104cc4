"""Which worker of a training this process is, and what it does together with the others."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed

from pipelines.clips.numbered import WorkerPart
from pipelines.training.config import Scale


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of `num_workers` processes that take the same steps; `data_cpus` of the cluster decode its clips."""

    rank: int
    num_workers: int
    device: torch.device
    data_cpus: float

    @classmethod
    def here(cls, scale: Scale) -> Worker:
        """The worker that Ray Train has made of this process."""
        context = ray.train.get_context()
        # Fewer than asked for where the run is elastic: always from the context, never from the scale.
        num_workers = context.get_world_size()
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            # Workers share the processors already; more threads only wait for one another.
            torch.set_num_threads(1)
        elif device.type == "cuda":
            # Workers of one node see the GPUs of all of them; kernels are launched on the current one, of this thread.
            torch.cuda.set_device(device)
        return cls(
            rank=context.get_world_rank(),
            num_workers=num_workers,
            device=device,
            data_cpus=count_data_cpus(scale, num_workers),
        )

    def part(self, *, start: int, batch: int, steps: int) -> WorkerPart:
        """This worker's part of the clips from number `start` on."""
        return WorkerPart(start=start, rank=self.rank, num_workers=self.num_workers, batch=batch, steps=steps)

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on any worker; all workers must ask, and all get the same answer."""
        if self.num_workers == 1:
            return condition
        flag = torch.tensor(float(condition), device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item() > 0)

    def gather(self, messages: list[str], *, most: int = 20) -> list[str]:
        """The messages of all workers by rank, the first `most`; all workers must ask."""
        gathered = [messages]
        if self.num_workers > 1:
            gathered = [[] for _ in range(self.num_workers)]
            torch.distributed.all_gather_object(gathered, messages)
        return [message for own in gathered for message in own][:most]


def count_data_cpus(scale: Scale, num_workers: int) -> float:
    """One worker's part of the CPUs that no worker has reserved."""
    if scale.data_cpus is not None:
        return scale.data_cpus / num_workers
    cpus = ray.cluster_resources().get("CPU", 1.0)
    return max(cpus - num_workers * scale.cpus_per_worker, 0.0) / num_workers
