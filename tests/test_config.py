"""What is refused before any worker starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from training_runs import make_index, make_run

import models
from pipelines.errors import DataError, RunError
from pipelines.training.config import check_run


@pytest.mark.parametrize("flags", [{}, {"sync_bn": True}])
def test_too_few_clips_for_batch_norm_are_refused(flags: dict[str, bool]) -> None:
    """C3D's hidden layers have one value of each channel in a clip."""
    message = r"c3d cannot train on 1 clip at a time: Expected more than 1 value .* --batch is 1: give more"
    with pytest.raises(RunError, match=message):
        check_run(make_run(batch=1, **flags), num_workers=1)
    check_run(make_run(batch=2, **flags), num_workers=1)


def test_what_batch_norm_does_not_see_may_be_one_clip() -> None:
    check_run(make_run(batch=1, train_only_head=True), num_workers=1)
    check_run(make_run(batch=1, sync_bn=True), num_workers=2)


@pytest.mark.parametrize("name", models.CONFIGS)
def test_two_clips_are_enough_for_every_network(name: str) -> None:
    stream = {} if name == "fused_two_stream" else {"stream": "flow"}
    model = models.configure(name, num_classes=2, width=0.125, size=32, **stream)
    check_run(replace(make_run(batch=2), model=model), num_workers=1)


def test_splits_without_videos_to_learn_from_are_refused() -> None:
    with pytest.raises(DataError, match="no labelled video in its shards for training: give another --train-split"):
        check_run(replace(make_run(), train=make_index(0)), num_workers=1)
    with pytest.raises(DataError, match="for validation: give another --validation-split, or none"):
        check_run(replace(make_run(), validation=make_index(0)), num_workers=1)
