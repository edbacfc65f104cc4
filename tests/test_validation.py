"""Validations: what they count, and that no score comes of videos that nobody saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import WORKER

import models
from pipelines.clips.loader import Batch, _to_batch
from pipelines.clips.numbered import cut_clips
from pipelines.datasets.video_index import VideoIndex, read_index
from pipelines.errors import OutageError
from pipelines.training import validation
from pipelines.training.config import Run, Scale
from pipelines.training.settings import PRESETS, make_run
from pipelines.training.state import TrainingState


@pytest.fixture
def run(motion_shards: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose validation cuts its clips in this process."""

    def cut_here(clips: Any, part: Any, *, num_cpus: float) -> Iterator[Batch]:
        for number in part.numbers(0, part.steps * part.batch):
            yield _to_batch(cut_clips(clips, [number]), clips)

    monkeypatch.setattr(validation, "stream_batches", cut_here)
    settings = PRESETS["debug"].change(network={"stream": "rgb", "model": "two_stream"})
    return make_run(settings, read_index(motion_shards), Scale(num_workers=1))


def validate(run: Run, videos: VideoIndex) -> dict[str, Any]:
    torch.manual_seed(0)
    state = TrainingState.build(models.build_from(run.model), run, torch.device("cpu"))
    return validation.validate(run, videos, WORKER, state)


def moved(videos: VideoIndex, old: str, new: str) -> VideoIndex:
    """The index with its shards somewhere else."""
    files = [file.replace(old, new) for file in videos.table["file"].to_pylist()]
    column = videos.table.schema.get_field_index("file")
    return replace(videos, table=videos.table.set_column(column, "file", [files]))


def test_all_videos_are_counted(run: Run) -> None:
    assert run.validation is not None
    found = validate(run, run.validation)
    assert (found["val_videos"], found["val_failed"]) == (6, 0)
    assert 0 <= found["val_top1"] <= found["val_top5"] <= 1
    assert found["val_loss"] > 0
    assert "errors" not in found


def test_a_shard_that_is_gone_counts_as_wrong_and_says_why(run: Run) -> None:
    assert run.validation is not None
    found = validate(run, moved(run.validation, "test-00000", "gone-00000"))
    assert found["val_failed"] == len(found["errors"]) == 4
    assert "FileNotFoundError" in found["errors"][0]


def test_nothing_that_decodes_is_no_score_of_zero(run: Run) -> None:
    assert run.validation is not None
    with pytest.raises(RuntimeError, match=r"none of the 6 validation videos could be decoded: test~.*FileNotFound"):
        validate(run, moved(run.validation, "test-0", "gone-0"))


def test_storage_that_is_away_ends_a_validation(run: Run, tmp_path: Path) -> None:
    assert run.validation is not None
    away = moved(run.validation, run.validation.data, str(tmp_path / "away"))
    with pytest.raises(OutageError, match=r"away cannot be read: .*away/shards"):
        validate(run, replace(away, data=str(tmp_path / "away")))
