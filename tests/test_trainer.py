"""Runs of jobs/train.py on two workers: what they leave, and that killing any part of one changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_jobs import run_here, succeed
from safetensors.torch import load_file

from models import checkpoint
from pipelines.datasets.video_index import read_index
from pipelines.errors import OutputLockedError
from pipelines.lock import lock_output
from pipelines.training.config import Scale
from pipelines.training.settings import PRESETS, prepare
from pipelines.training.trainer import train as train_run
from pipelines.training.weights_files import find_checkpoint, local_checkpoint

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 30, 10  # some seconds between checkpoints, of which Ray takes note twice a second
LOGGED = 5
FLAGS = ["--num-gpus", "0", "--preset", "debug", "--stream", "flow", "--num-workers", "2"]
FLAGS += f"--steps {STEPS} --log-every {LOGGED} --checkpoint-every {EVERY}".split()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a busy machine is no failure


def command(data: str, output: Path | str, *more: str) -> list[str]:
    return [sys.executable, "jobs/train.py", "--data", data, "--output", str(output), *FLAGS, *more]


SHORT = ["--steps", "16", "--checkpoint-every", "8"]
ALONE = ["--validation-split", "none", "--num-workers", "1"]


def train(data: str, output: Path | str, *more: str) -> str:
    """What the training prints. Its workers are processes of Ray, but the driver is this one."""
    return succeed("train", *command(data, output, *more)[2:])


def give_up(data: str, output: Path, *more: str) -> str:
    """What is said on stderr by a training that ends with an error."""
    done = run_here("train", *command(data, output, *more)[2:])
    assert done.returncode == 1, done.stdout
    return done.stderr


def start(data: str, output: Path) -> subprocess.Popen[bytes]:
    log = output.with_suffix(".log").open("wb")
    return subprocess.Popen(command(data, output), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def lines(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def weights(output: Path) -> dict[str, torch.Tensor]:
    result = json.loads((output / "result.json").read_text())
    return load_file(output / result["last"] / "weights.safetensors")


def assert_same_run(output: Path, undisturbed: Path) -> None:
    """Equal weights to the bit, and a loss curve without gap, repetition or difference."""
    found, expected = weights(output), weights(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [line["step"] for line in lines(output)] == [line["step"] for line in lines(undisturbed)]
    assert [line["loss"] for line in lines(output)] == [line["loss"] for line in lines(undisturbed)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def checkpoint_noted(output: Path, *, after: int = 0) -> Callable[[], bool]:
    """Whether the run has taken note of a checkpoint of a later step, which a restart goes on from."""
    snapshot = output / "checkpoints" / "checkpoint_manager_snapshot.json"

    def noted() -> bool:
        clips = re.findall(r"clips-(\d+)", snapshot.read_text()) if snapshot.exists() else []
        return any(int(seen) > 8 * after for seen in clips)

    return noted


def descendants(pid: int) -> dict[int, str]:
    """Pids below a process, with their command lines."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    below, found = {pid}, {}
    while more := [row for row in rows if int(row[1]) in below and int(row[0]) not in below]:
        for row in more:
            below.add(int(row[0]))
            found[int(row[0])] = row[2] if len(row) > 2 else ""
    return found


@pytest.fixture(scope="module")
def undisturbed(ray_here: None, motion_shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    return output, train(motion_shards, output)


def test_a_run_leaves_a_folder_that_explains_itself(undisturbed: tuple[Path, str], motion_shards: str) -> None:
    output, _ = undisturbed
    run = json.loads((output / "run.json").read_text())
    assert (run["data"], run["seed"], run["train_videos"], run["validation_videos"]) == (motion_shards, 0, 12, 6)
    assert [line["step"] for line in lines(output)] == list(range(LOGGED, STEPS + 1, LOGGED))
    assert [line["step"] for line in lines(output, "validation")] == [10, 20, 30]
    assert all(0 <= line["wait_share"] <= 1 and line["failed"] == 0 for line in lines(output))
    result = json.loads((output / "result.json").read_text())
    assert result["last"] == "checkpoints/clips-000000240"
    assert len(list((output / "checkpoints").glob("clips-*"))) <= 2
    assert list((output / "tensorboard").iterdir())


def test_its_checkpoint_says_how_it_was_made(undisturbed: tuple[Path, str]) -> None:
    model, metadata = checkpoint.load(undisturbed[0] / "checkpoints" / "clips-000000240")
    assert model.config.width == 0.125
    assert metadata.classes == ("down", "grow", "left", "right", "shrink", "up")
    assert metadata.flow_convention is not None
    assert metadata.clips == {"resize": "shorter", "flow_bound": 20.0, "short_side": 40}
    state = checkpoint.load_training_state(undisturbed[0] / "checkpoints" / "clips-000000240")
    assert state is not None
    assert state["clips_seen"] == STEPS * 8


def test_it_prints_lines_that_read_well_in_a_log(undisturbed: tuple[Path, str]) -> None:
    printed = undisturbed[1]
    assert "workers     2 CPUs, 4 × 1 clips each a step" in printed
    assert "step      30  validation: top-1" in printed
    assert "RayTrainWorker" not in printed
    assert "\r" not in printed


def test_weights_have_left_their_beginning(undisturbed: tuple[Path, str]) -> None:
    first = load_file(undisturbed[0] / "initial" / "weights.safetensors")
    moved = {name for name, tensor in weights(undisturbed[0]).items() if not torch.equal(tensor, first[name])}
    assert moved == set(first)


def test_a_finished_run_is_not_repeated(
    undisturbed: tuple[Path, str], motion_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.train.connect", lambda **_: pytest.fail("Ray was started"))
    before = (undisturbed[0] / "metrics.jsonl").read_bytes()
    assert "clips-000000240" in train(motion_shards, undisturbed[0])
    assert (undisturbed[0] / "metrics.jsonl").read_bytes() == before


def test_another_run_on_the_same_folder_is_refused(undisturbed: tuple[Path, str], motion_shards: str) -> None:
    said = give_up(motion_shards, undisturbed[0], "--seed", "1")
    assert "was begun with other settings:\n  seed: 0 there, 1 now" in said


def test_a_killed_worker_is_replaced_a_killed_driver_goes_on_and_the_weights_are_the_same(
    undisturbed: tuple[Path, str], motion_shards: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(motion_shards, output)
    wait_for(checkpoint_noted(output), process, output.with_suffix(".log"))
    workers = [pid for pid, args in descendants(process.pid).items() if args.startswith("ray::RayTrainWo")]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    wait_for(checkpoint_noted(output, after=EVERY), process, output.with_suffix(".log"))
    process.kill()
    process.wait(timeout=60)
    assert not (output / "result.json").exists()
    train(motion_shards, output)
    assert_same_run(output, undisturbed[0])


@pytest.mark.soak
def test_a_lost_node_is_replaced_and_the_weights_are_the_same(
    undisturbed: tuple[Path, str], motion_shards: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    train_on_nodes(motion_shards, output, "spare")
    assert_same_run(output, undisturbed[0])


@pytest.mark.soak
def test_with_min_workers_training_goes_on_without_the_lost_node(motion_shards: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_on_nodes(motion_shards, output, "elastic")
    assert [line["step"] for line in lines(output)] == list(range(LOGGED, STEPS + 1, LOGGED))
    assert [line["clips"] for line in lines(output)] == [8 * step for step in range(LOGGED, STEPS + 1, LOGGED)]
    # One worker takes steps of half the clips at half the rate.
    assert (lines(output)[0]["learning_rate"], lines(output)[-1]["learning_rate"]) == pytest.approx((0.05, 0.00025))


def train_on_nodes(data: str, output: Path, way: str) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    schedule = f"{STEPS},{LOGGED},{EVERY}"
    script = [sys.executable, "tests/train_on_nodes.py", data, str(output), way, schedule]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout.index("lost a node") < done.stdout.index("trained")


@pytest.mark.soak
def test_transfer_trains_the_classifier_only_on_each_fold(
    undisturbed: tuple[Path, str], motion_shards: str, tmp_path: Path
) -> None:
    for fold in (1, 2):
        for name in ("left", "up"):
            uses = {1: (1, 2), 2: (2, 1)}[fold]
            divisions = [f"{name}_{index:04d}.mp4 {use}" for index, use in zip((0, 1), uses, strict=True)]
            (tmp_path / f"{name}_test_split{fold}.txt").write_text("\n".join(divisions) + "\n")
    flags = ["--init", "checkpoint", "--weights", str(undisturbed[0]), "--finetune", "head", "--precision", "bf16"]
    flags += ["--accumulate", "2", "--clip-norm", "1", "--annotations", str(tmp_path), "--folds", "1", "2", *SHORT]
    printed = train(motion_shards, tmp_path / "out", *flags, "--set", "bn_momentum=0.1")
    assert "folds       top-1" in printed
    source = weights(undisturbed[0])
    for fold in (1, 2):
        found = weights(tmp_path / "out" / f"fold-{fold}")
        assert all(line["failed"] == 0 and line["loss"] > 0 for line in lines(tmp_path / "out" / f"fold-{fold}"))
        changed = {name for name, tensor in found.items() if not torch.equal(tensor, source[name])}
        assert changed == {"logits.weight", "logits.bias"}
        assert found["logits.bias"].shape == (2,)
        evaluated = json.loads((tmp_path / "out" / f"fold-{fold}" / "evaluation" / "evaluation.json").read_text())
        assert evaluated["expected"] == evaluated["evaluated"] == 2


@pytest.mark.soak
def test_with_a_shard_gone_training_goes_on_and_says_so(motion_shards: str, tmp_path: Path) -> None:
    shutil.copytree(motion_shards, tmp_path / "data", ignore=shutil.ignore_patterns("train-00000.parquet"))
    printed = train(str(tmp_path / "data"), tmp_path / "run", *ALONE, *SHORT)
    assert "clips could not be decoded" in printed
    assert "not decoded: train~" in printed
    assert 0 < sum(line["failed"] for line in lines(tmp_path / "run")) < 16 * 4
    with local_checkpoint(find_checkpoint(str(tmp_path / "run"))) as folder:
        assert checkpoint.load(folder)[1].extra["step"] == 16


@pytest.mark.soak
def test_shards_that_are_all_gone_end_the_run_with_the_reason(motion_shards: str, tmp_path: Path) -> None:
    shutil.copytree(motion_shards, tmp_path / "data", ignore=shutil.ignore_patterns("shards"))
    said = give_up(str(tmp_path / "data"), tmp_path / "run", *ALONE, "--max-failures", "0")
    assert "error: the training was given up" in said
    assert "clips could be decoded: train~" in said
    assert not list(tmp_path.glob("run/checkpoints/clips-*"))


@pytest.mark.soak
def test_workers_of_a_run_that_has_lost_its_lock_stop_and_write_nothing(motion_shards: str, tmp_path: Path) -> None:
    """Ray's workers train on while their driver sleeps, and another run goes on from the same checkpoints."""
    output = tmp_path / "run"
    scale = Scale(num_workers=1, use_gpu=False, cleaner=False)
    settings = PRESETS["debug"].change(
        network={"stream": "flow"},
        schedule={"steps": 1_000},
        reporting={"log_every": 2},
        splits={"validation_split": "none"},
    )
    run, model = prepare(settings, read_index(motion_shards), scale)
    with lock_output(str(output)) as lock:
        late = dataclasses.replace(lock.claim, token="of a run before")
        with pytest.raises(OutputLockedError, match="taken over by another run"):
            train_run(run, model, str(output), scale, claim=late)
    assert not (output / "metrics.jsonl").exists()
    assert not list(output.glob("checkpoints/clips-*"))
    assert not list(output.glob("tensorboard/*"))


@pytest.mark.soak
def test_a_run_that_diverges_says_so_and_has_no_result(motion_shards: str, tmp_path: Path) -> None:
    said = give_up(motion_shards, tmp_path / "run", *ALONE, *SHORT, "--learning-rate", "1e30")
    assert "error: the training diverged: by step 5 (20 clips)" in said
    assert lines(tmp_path / "run")[-1]["top1"] < 1
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.soak
@pytest.mark.parametrize("job", ["train", "tune"])
def test_ctrl_c_says_that_the_same_command_goes_on(motion_shards: str, tmp_path: Path, job: str) -> None:
    """Ray Train and Tune have handlers of their own, which end the process without a word, or as if it were done."""
    output, log = tmp_path / "run", tmp_path / "log"
    words = [sys.executable, f"jobs/{job}.py", "--data", motion_shards, "--output", str(output), "--num-gpus", "0"]
    words += ["--stream", "flow", "--preset", "debug", "--steps", "1000", "--log-every", "2", "--num-workers", "1"]
    with log.open("wb") as said:
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said)
    wait_for(lambda: any(output.rglob("metrics.jsonl")), process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == 130
    assert "\nstopped; the same command goes on\n" in log.read_text()


@pytest.mark.soak
def test_an_outage_of_the_data_ends_the_run_which_then_goes_on_to_the_same_weights(
    undisturbed: tuple[Path, str], motion_shards: str, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(motion_shards, data)
    process = start(str(data), output)
    wait_for(checkpoint_noted(output), process, output.with_suffix(".log"))
    data.rename(tmp_path / "away")
    process.wait(timeout=400)
    printed = output.with_suffix(".log").read_text()
    assert process.returncode == 1, printed
    assert re.search(r"error: the training was given up: .*OutageError: .*/data cannot be read", printed)
    (tmp_path / "away").rename(data)
    train(str(data), output)
    assert_same_run(output, undisturbed[0])


@pytest.mark.soak
def test_a_preset_goes_on_with_more_workers(motion_shards: str, tmp_path: Path) -> None:
    """Its steps are then of twice the clips, so that their numbers come again; no checkpoint's name does."""
    output = tmp_path / "run"
    words = ["--data", motion_shards, "--output", str(output), "--stream", "flow", "--preset", "debug", "--size", "64"]
    words = [sys.executable, "jobs/train.py", *words, "--validation-split", "none", "--checkpoint-every", "10"]
    log = output.with_suffix(".log").open("wb")
    first = subprocess.Popen([*words, "--num-workers", "1"], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    wait_for(checkpoint_noted(output, after=9), first, output.with_suffix(".log"))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run([*words, "--num-workers", "2"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((output / "result.json").read_text())["last"] == "checkpoints/clips-000000160"
    assert set(weights(output)) == set(load_file(output / "initial" / "weights.safetensors"))
