"""What the flags of jobs/train.py mean, without training anything."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pytest

from jobs.command import run_command, with_preset
from jobs.evaluate import Evaluate
from jobs.train import Train, WaitNotes, Workers
from pipelines.datasets.video_index import read_index
from pipelines.errors import DataError, SettingsError
from pipelines.search.space import Space, with_geometry
from pipelines.training.config import Scale
from pipelines.training.settings import PRESETS, TrainingSettings, make_run

CPUS = Scale(num_workers=2)
DEBUG = PRESETS["debug"].change(network={"stream": "rgb"})


def parse(monkeypatch: pytest.MonkeyPatch, *flags: str) -> TrainingSettings:
    """The settings that a command line means."""
    found: list[Train] = []
    words = ["train.py", "--data", "shards", "--output", "run", *flags]
    monkeypatch.setattr(sys, "argv", words)
    run_command(with_preset(Train, PRESETS), found.append, "Train.")
    return found[0].settings


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["i3d", "convnet_lstm", "c3d", "two_stream"])
def test_every_preset_configures_every_network(name: Any, model: str) -> None:
    settings = PRESETS[name].change(network={"model": model, "stream": "rgb"})
    assert settings.network.configure(400).num_classes == 400
    phases = settings.schedule.phases
    assert settings.schedule.resolve(8).clips == settings.schedule.reference_batch * sum(n for n, _ in phases)


def test_a_flag_wins_over_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--stream rgb --width 0.5 --batch 3 --weight-decay 0.1 --steps 50 --set dropout=0.1 --seed 4"
    settings = parse(monkeypatch, "--preset=small", *words.split())
    model = settings.network.configure(6)
    assert (model.width, model.dropout, model.size) == (0.5, 0.1, 64)
    assert (settings.optimisation.batch, settings.optimisation.weight_decay, settings.seed) == (3, 0.1, 4)
    assert settings.schedule.resolve(6).steps(6) == 50
    assert settings.schedule.warmup_steps == 50  # the preset's


def test_a_flag_that_says_the_default_wins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(monkeypatch, "--preset", "small", "--batch", "6").optimisation.batch == 6
    assert parse(monkeypatch, "--preset", "small").optimisation.batch == 4


def test_a_learning_rate_keeps_the_shape_of_the_presets_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = parse(monkeypatch, "--preset", "kinetics400_rgb", "--learning-rate", "0.2").schedule.resolve(384)
    assert schedule.phases == ((97_000, 0.2), (11_000, pytest.approx(0.02)), (7_000, pytest.approx(0.002)))


def test_a_searched_learning_rate_reaches_a_preset() -> None:
    geometry = Space(paper_frames=16, learning_rate=(0.001, 0.1), paper_learning_rate=0.01).paper()
    found = with_geometry(DEBUG, geometry)
    assert found.schedule.resolve(8).phases == ((20, 0.01),)
    assert found.network.configure(6).frames == 16  # type: ignore[attr-defined]


def test_an_unknown_preset_is_refused_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--preset", "kinetics")
    assert "kinetics400_rgb" in capsys.readouterr().err


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(SettingsError, match="--seed is -1"):
        DEBUG.change(seed=-1)


def test_lists_and_words_can_be_set() -> None:
    model = DEBUG.change(network={"set": ("pool_strides=[1,1,1,2]", "conv1_kernel=5")}).network.configure(6)
    assert (model.pool_strides, model.conv1_kernel) == ((1, 1, 1, 2), 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"settings": TrainingSettings()}, "neither --preset nor --steps"),
        ({"folds": (1,)}, "--folds is given but --annotations is not"),
        ({"data": "nowhere://bucket"}, "cannot open"),
        ({"preset": "small"}, "the settings are others"),
        ({"from_sweep": "s", "settings": DEBUG.change(network={"model": "c3d"})}, "--model is c3d"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Train(**{"data": "shards", "output": "run", "settings": DEBUG, **flags})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"initial": {"finetune": "head"}}, "--finetune needs weights"),
        ({"schedule": {"drops": (0.5,)}}, "--drops divides --steps"),
        ({"reporting": {"validation_clips": 0}}, "--validation-clips is 0"),
        ({"optimisation": {"batch": 0}}, "--batch is 0"),
        ({"optimisation": {"momentum": -0.1}}, "--momentum is -0.1"),
        ({"optimisation": {"weight_decay": math.nan}}, "--weight-decay is nan"),
        ({"optimisation": {"clip_norm": math.nan}}, "--clip-norm is nan"),
        ({"schedule": {"steps": 0}}, "--steps is 0: give at least 1"),
        ({"schedule": {"learning_rate": 0.0}}, "--learning-rate is 0.0: give a rate above 0"),
        ({"schedule": {"learning_rate": math.inf}}, "--learning-rate is inf"),
    ],
)
def test_settings_that_cannot_be(group: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DEBUG.change(**group)


def test_more_workers_than_at_most() -> None:
    with pytest.raises(SettingsError, match="--min-workers is 3"):
        Workers(num_workers=2, min_workers=3)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"stream": None}, "i3d sees one stream"),
        ({"set": ("dropout",)}, "give NAME=VALUE"),
        ({"set": ("depth=3",)}, "has no settings"),
        ({"size": 16}, "size is 16"),
    ],
)
def test_networks_that_cannot_be_made(network: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DEBUG.change(network=network).network.configure(6)


@pytest.mark.parametrize("optimisation", [{"sync_bn": True}, {"precision": "fp16"}])
def test_what_needs_gpus_says_so(motion_shards: str, optimisation: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="need GPUs"):
        make_run(DEBUG.change(optimisation=optimisation), read_index(motion_shards), CPUS)
    with pytest.raises(SettingsError, match="need GPUs"):
        make_run(DEBUG, read_index(motion_shards), replace(CPUS, compile=True))


def test_the_run_knows_its_videos_and_its_flow(motion_shards: str) -> None:
    index, settings = read_index(motion_shards), DEBUG.change(network={"stream": "flow"})
    run = make_run(settings, index, CPUS)
    assert (len(run.train), len(run.validation or ())) == (12, 6)
    assert run.clips.to_json() == {"resize": "shorter", "flow_bound": 20.0, "short_side": 40}
    assert make_run(settings.change(clips={"flow_bound": 2}), index, CPUS).clips.bound == 2
    assert make_run(settings.change(splits={"validation_split": "none"}), index, CPUS).validation is None
    with pytest.raises(DataError, match="no split 'dev'"):
        make_run(settings.change(splits={"train_split": "dev"}), index, CPUS)


def test_no_network_is_chosen_by_the_videos_it_was_trained_on(motion_shards: str) -> None:
    index = read_index(motion_shards)
    assert make_run(DEBUG.change(splits={"train_split": "test"}), index, CPUS).validation is None
    named = make_run(DEBUG.change(splits={"train_split": "test", "validation_split": "test"}), index, CPUS)
    assert len(named.validation or ()) == len(named.train)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_workers": 0}, "--num-workers is 0: give at least 1"),
        ({"num_cpus": -1}, "--num-cpus is -1: give at least 1"),
        ({"num_gpus": -1}, "--num-gpus is -1: give at least 0"),
    ],
)
@pytest.mark.parametrize("job", [Workers, partial(Evaluate, data="d", output="o", model="m")])
def test_so_few_workers_cannot_be(job: Callable[..., object], flags: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        job(**flags)


def test_a_run_cannot_fail_less_than_never() -> None:
    with pytest.raises(SettingsError, match="--max-failures is -1"):
        Workers(max_failures=-1)


def test_a_preset_is_the_same_run_on_any_number_of_workers(motion_shards: str) -> None:
    small, index = PRESETS["small"].change(network={"stream": "rgb"}), read_index(motion_shards)
    few, many = (make_run(small, index, Scale(num_workers=num_workers)) for num_workers in (4, 8))
    assert few.describe() == many.describe()
    clips = [run.reporting.checkpoint_clips(run.schedule, size) for run, size in ((few, 16), (many, 32))]
    assert clips == [1_280, 1_280]
    asked = make_run(small.change(reporting={"checkpoint_every": 50}), index, CPUS)
    assert asked.reporting.checkpoint_clips(asked.schedule, 16) == 800


@pytest.mark.parametrize("classes", [(), ("down", "up")])
def test_data_without_labels_is_refused_in_one_sentence(motion_shards: str, classes: tuple[str, ...]) -> None:
    index = read_index(motion_shards)
    column = index.table.schema.get_field_index("label")
    unlabelled = index.table.set_column(column, "label", pa.array([-1] * len(index), pa.int32()))
    with pytest.raises(DataError, match=r"has no labels on 20 videos: .* --annotations"):
        make_run(DEBUG, replace(index, table=unlabelled, classes=classes), CPUS)


def test_gpus_that_wait_for_clips_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WaitNotes, "count_cpus", lambda self: 15.0)
    shares = [0.85, 0.04, 0.36, 0.4]  # the first steps wait for the first clips

    def notes(scale: Scale) -> list[str | None]:
        said = WaitNotes(scale)
        return [said.of({"kind": "train", "wait_share": share}) for share in shares] + [said.of({"kind": "validation"})]

    assert notes(Scale(num_workers=1)) == [None] * 5
    first, second, note, *rest = notes(Scale(num_workers=1, use_gpu=True))
    assert [first, second, *rest] == [None] * 4
    assert note is not None
    assert note.startswith("the GPUs waited 36% of the time for clips: 15 CPUs cut them, about 24 would keep up;")
