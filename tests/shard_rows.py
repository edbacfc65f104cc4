"""Rows of shards with tiny real videos, for tests of whatever writes or reads shards."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from pipelines.datasets.records import ShardConvention
from pipelines.datasets.shards import FACTS, Row, ShardSettings, write_rows
from pipelines.extraction.plan import ExtractionSettings, make_convention
from pipelines.media.codec import CodecSettings, FlowEncoder, RGBEncoder

HEIGHT, WIDTH, NUM_FRAMES = 16, 24, 4
FLOW = (5.0, -2.5)  # px, (u, v) of every pixel


def convention_of(settings: CodecSettings) -> ShardConvention:
    """What an extraction with these codecs writes into its shards."""
    return make_convention(ExtractionSettings(codec=settings), "cpu-test")


def make_row(settings: CodecSettings, index: int = 0, *, num_frames: int = NUM_FRAMES, **facts: Any) -> Row:
    """A row whose RGB has one grey value a frame, 16 · index + 4 · frame, and whose flow is FLOW everywhere."""
    rgb = RGBEncoder(settings, height=HEIGHT, width=WIDTH)
    flow = FlowEncoder(settings, height=HEIGHT, width=WIDTH)
    for frame in range(num_frames):
        rgb.write(np.full((HEIGHT, WIDTH, 3), 16 * index + 4 * frame, np.uint8))
        if frame:
            flow.write(np.broadcast_to(np.array(FLOW, np.float32), (HEIGHT, WIDTH, 2)))
    row: Row = dict.fromkeys(FACTS)
    row |= {"id": f"video{index}", "label": 0, "class_name": "wave", "split": "train", "source": f"wave/{index}.mp4"}
    row |= {
        "source_sha256": f"{index:064x}",
        "fps": 25.0,
        "source_fps": 25.0,
        "num_frames": num_frames,
        "height": HEIGHT,
        "width": WIDTH,
    }
    row |= {"timing": "time", "partial": False, "flow_mean": flow.mean_magnitude, "flow_clipped": 0.0}
    return {**row, "rgb": rgb.close(), "flow": flow.close(), **facts}


def encode_shard(rows: list[Row], settings: ShardSettings, convention: ShardConvention) -> bytes:
    """A shard as bytes."""
    file = io.BytesIO()
    write_rows(file, rows, settings, convention)
    return file.getvalue()
