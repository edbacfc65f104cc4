"""What the flags of jobs/train.py mean, without training anything."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.train import Train, make_model_config, make_optimisation, make_run
from pipelines.datasets.video_index import DataError, read_index
from pipelines.training.config import Scale
from pipelines.training.schedule import PRESETS

CPUS = Scale(num_workers=2)


def config(**flags: Any) -> Train:
    return Train(**{"data": "shards", "output": "run", "stream": "rgb", "preset": "debug", **flags})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["i3d", "convnet_lstm", "c3d", "two_stream"])
def test_every_preset_configures_every_network(name: str, model: str) -> None:
    given = config(preset=name, model=model)
    assert make_model_config(given, PRESETS[name], num_classes=400).num_classes == 400
    optimisation = make_optimisation(given, PRESETS[name], CPUS)
    assert optimisation.schedule.clips == PRESETS[name].reference_batch * sum(n for n, _ in PRESETS[name].phases)


def test_a_flag_wins_over_its_preset() -> None:
    given = config(preset="small", width=0.5, batch=3, weight_decay=0.1, steps=50, set=("dropout=0.1",))
    model = make_model_config(given, PRESETS["small"], num_classes=6)
    optimisation = make_optimisation(given, PRESETS["small"], CPUS)
    assert (model.width, model.dropout, model.size) == (0.5, 0.1, 64)
    assert (optimisation.batch, optimisation.weight_decay, optimisation.schedule.steps(6)) == (3, 0.1, 50)


def test_lists_and_words_can_be_set() -> None:
    given = config(set=("pool_strides=[1,1,1,2]", "conv1_kernel=5"))
    model = make_model_config(given, None, num_classes=6)
    assert (model.pool_strides, model.conv1_kernel) == ((1, 1, 1, 2), 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": None}, "neither --preset .* nor --steps"),
        ({"folds": (1,)}, "--folds is given but --annotations is not"),
        ({"finetune": "head"}, "--finetune needs weights"),
        ({"min_workers": 3, "num_workers": 2}, "--min-workers is 3"),
        ({"data": "gs://bucket"}, "cannot open"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stream": None}, "i3d sees one stream"),
        ({"set": ("dropout",)}, "give NAME=VALUE"),
        ({"set": ("depth=3",)}, "has no settings"),
        ({"size": 16}, "size is 16"),
    ],
)
def test_networks_that_cannot_be_made(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model_config(config(**flags), PRESETS["debug"], num_classes=6)


@pytest.mark.parametrize("flags", [{"sync_bn": True}, {"compile": True}, {"precision": "fp16"}])
def test_what_needs_gpus_says_so(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need GPUs"):
        make_optimisation(config(**flags), PRESETS["debug"], CPUS)


def test_the_run_knows_its_videos_and_its_flow(motion_shards: str) -> None:
    run = make_run(config(stream="flow"), read_index(motion_shards), CPUS)
    assert (len(run.train), len(run.validation or ())) == (12, 6)
    assert run.clips.to_json() == {"resize": "shorter", "flow_bound": 20.0, "short_side": 40}
    assert make_run(config(flow_bound=2), read_index(motion_shards), CPUS).clips.flow_bound == 2
    assert make_run(config(validation_split="none"), read_index(motion_shards), CPUS).validation is None
    with pytest.raises(DataError, match="no split 'dev'"):
        make_run(config(train_split="dev"), read_index(motion_shards), CPUS)
