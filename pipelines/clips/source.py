"""What Ray Data reads: one worker's part of a run's clips, cut by the tasks that read. No torch: its import takes a
process that decodes two seconds and 200 MB.
"""

from __future__ import annotations

from functools import partial

import cv2
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipelines.clips.numbered import NumberedClips, WorkerPart, cut_clips


class ClipSource(Datasource):
    """What Ray Data reads: a part's clips, one read task for each `clips_per_task` of them, in order.

    The tasks that read also cut, so that they ask for the CPUs that they are given and nothing waits for more.
    """

    def __init__(self, clips: NumberedClips, part: WorkerPart) -> None:
        super().__init__()
        self.clips, self.part, self.size = clips, part, clips.clips_per_task(part.batch)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task for each part of the part, whatever `parallelism` is."""
        clips_ref = ray.put((self.clips, self.part))  # once, not in each task: an index may name 250,000 videos
        tasks = []
        for first in range(0, self.part.steps * self.part.batch, self.size):
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(_read_clips, clips_ref, first, self.size), metadata))
        return tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _read_clips(clips_ref: ray.ObjectRef, first: int, count: int) -> list[Block]:
    cv2.setNumThreads(1)
    clips, part = ray.get(clips_ref)
    return [BlockAccessor.batch_to_block(cut_clips(clips, part.numbers(first, count)))]
