"""What is measured over clips and workers: sums on each worker, added up over all of them, divided once at the end."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

COUNTED = ("loss", "top1", "top5", "clips", "failed", "seconds", "waited")


class Sums:
    """Sums over the clips of this worker since the last reduction."""

    def __init__(self, device: torch.device) -> None:
        # float64 on the device: exact for counts, and adding to it never waits for the GPU.
        self.values = torch.zeros(len(COUNTED), dtype=torch.float64, device=device)

    def add(self, **values: float | Tensor) -> None:
        """Add to the sums of these names, which are among `COUNTED`."""
        for name, value in values.items():
            self.values[COUNTED.index(name)] += value

    def reduce(self) -> dict[str, float]:
        """The sums over all workers, which must all ask; begins anew."""
        # A single worker has no process group.
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.values)
        totals = dict(zip(COUNTED, self.values.tolist(), strict=True))
        self.values.zero_()
        return totals


def count_hits(scores: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Clips whose class is the first, or among the first five, of their scores (B, num_classes).

    A clip with a score that is not finite is never right: `topk` would put NaN first, and a network that has diverged
    would be right about everything.
    """
    weights = weights * scores.isfinite().all(dim=1)
    first = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": (first[:, 0] * weights).sum(), "top5": (first.any(dim=1) * weights).sum()}
