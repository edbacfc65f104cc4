"""Jobs submitted to a running head, as on a cluster: token authentication on, all sockets on loopback."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from extracted import FLAGS, extract_here, hashes, plan_here
from ray_head import Head, read_job, run_head, stop_job, wait_until
from safetensors.torch import load_file

from pipelines.datasets.motion_videos import write_motion_videos

EXTRACT = ("jobs/extract_flow.py", *FLAGS)
TRAIN = ("jobs/train.py", "--stream", "flow", "--preset", "debug", "--learning-rate", "0.02")
SHORT, LONG = (("--steps", str(steps), "--checkpoint-every", "10") for steps in (10, 60))
SUBMITTED = re.compile(r"submitted +(raysubmit_\w+)")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_JOB_STOP_WAIT_TIME_S": "120"}  # on 127.0.0.1 only
    with run_head(tmp_path_factory.mktemp("home"), "--num-cpus=2", **alone) as head:
        yield head


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("videos")
    write_motion_videos(folder, videos_per_class=3, seed=0, num_frames=40, size=(64, 48))
    return str(folder)


class Extracted(NamedTuple):
    """Shards of an extraction that was stopped and went on."""

    output: Path
    stopped: str  # what it said, followed by the submitter, until it was stopped
    said: str  # and what it said then, to its end
    kept: dict[Path, int]  # the shards that there were in between, each with the time it was written


@pytest.fixture(scope="module")
def extracted(head: Head, videos: str, tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    output = tmp_path_factory.mktemp("extracted") / "shards"
    words = (*EXTRACT, "--num-cpus", "1", "--videos", videos, "--output", str(output))
    stopped = stop_when(head, words, lambda: len(list((output / "commits").glob("*.json"))) > 0)
    assert not (output / "dataset.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (output / "shards").glob("*.parquet")}
    status, said = head.submit(*words)
    assert status == 0, said
    return Extracted(output, stopped, said, kept)


@pytest.fixture(scope="module")
def trained(head: Head, extracted: Extracted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing disturbed, and what it said."""
    output = tmp_path_factory.mktemp("trained") / "run"
    status, text = head.submit(*TRAIN, *SHORT, "--data", str(extracted.output), "--output", str(output))
    assert status == 0, text
    return output, text


def weights(run: Path) -> dict[str, torch.Tensor]:
    result = json.loads((run / "result.json").read_text())
    return load_file(run / result["last"] / "weights.safetensors")


def check_log(text: str) -> None:
    """Lines of our own only: no progress bars, no boxes, no prefixes of workers, no tracebacks."""
    log = text.split("Running entrypoint for job", 1)[1].split("INFO sdk.py", 1)[0]
    assert "\r" not in log
    assert not re.search(r"\(pid=|Traceback|Progress|╭|INFO|Warning", log), log


def test_an_extraction_says_what_it_does(extracted: Extracted) -> None:
    check_log(extracted.said)
    assert "ray         a cluster of 1 node, 2 CPUs, 0 GPUs" in extracted.said
    assert re.search(r"(\d+) of \1 videos?, \d+ frames/s, \d+ shards? left\n", extracted.said)
    splits = json.loads((extracted.output / "dataset.json").read_text())["splits"]
    assert {name: counts["ok"] for name, counts in splits.items()} == {"train": 12, "test": 6}


@pytest.mark.soak
def test_a_training_says_what_it_does(trained: tuple[Path, str]) -> None:
    output, text = trained
    check_log(text)
    assert re.search(r"step +10  validation: top-1 [\d.]+% of 6 videos", text)
    assert (output / "result.json").exists()


@pytest.mark.soak
def test_a_search_says_what_it_does(head: Head, extracted: Extracted, tmp_path: Path) -> None:
    flags = ["--stream", "flow", "--preset", "debug", "--steps", "6", "--trials", "2", "--rungs", "1"]
    flags += ["--confirm-seeds", "2"]
    status, text = head.submit(
        "jobs/tune.py", *flags, "--data", str(extracted.output), "--output", str(tmp_path / "sweep")
    )
    assert status == 0, text
    check_log(text)
    assert "trials      2 finished, 0 stopped, 0 failed" in text
    assert len(json.loads((tmp_path / "sweep" / "result.json").read_text())["paper"]["seeds"]) == 2


@pytest.mark.soak
def test_an_evaluation_says_what_it_found(
    head: Head, extracted: Extracted, trained: tuple[Path, str], tmp_path: Path
) -> None:
    flags = ("--data", str(extracted.output), "--flow", str(trained[0]), "--output", str(tmp_path / "evaluation"))
    status, text = head.submit("jobs/evaluate.py", *flags)
    assert status == 0, text
    check_log(text)
    assert "evaluated   6 of 6 videos; 0 missing, 0 quarantined, 0 failed" in text
    assert (tmp_path / "evaluation" / "evaluation.json").exists()


def test_a_job_that_fails_says_why(head: Head) -> None:
    status, text = head.run("python", "jobs/submit.py", "--", *EXTRACT, "--videos", "nowhere", "--output", "out")
    assert status == 1
    assert "error: --output is out: a submitted job stands in a copy of the project" in text
    assert "Traceback" not in text


def test_without_the_token_nobody_gets_in(head: Head, tmp_path: Path) -> None:
    stranger = Head(head.address, {**head.environment, "HOME": str(tmp_path)})
    status, text = stranger.submit("jobs/extract_flow.py")
    assert status != 0
    assert "AuthenticationError" in text
    status, text = stranger.run("python", "jobs/submit.py", "--", "jobs/extract_flow.py")
    assert status == 1
    assert re.fullmatch(rf"error: {head.address} wants a token: .*\n", text)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    status, text = stranger.run("python", "jobs/submit.py", "--", "jobs/extract_flow.py")
    assert status == 1
    assert re.fullmatch(rf"error: {head.address} wants a token: .*\n", text)


def test_an_extraction_that_was_stopped_ends_with_the_bytes_of_one_that_nothing_disturbed(
    extracted: Extracted, videos: str, tmp_path: Path
) -> None:
    assert "stopped; the same command goes on\n" in extracted.stopped
    assert "; 0 shards done" not in extracted.said
    assert 0 < len(extracted.kept) < 9
    assert sum(path.stat().st_mtime_ns == then for path, then in extracted.kept.items()) >= 1
    extract_here(plan_here(videos, str(tmp_path)))
    assert hashes(extracted.output) == hashes(tmp_path)


@pytest.mark.soak
def test_a_training_that_was_stopped_ends_with_the_same_weights(
    head: Head, extracted: Extracted, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = (*TRAIN, *LONG, "--data", str(extracted.output), "--output", str(output))
    snapshot = output / "checkpoints" / "checkpoint_manager_snapshot.json"
    text = stop_when(head, words, lambda: snapshot.exists() and "clips-" in snapshot.read_text())
    assert "stopped; the same command goes on" in text
    assert not (output / "result.json").exists()
    status, text = head.submit(*words)
    assert status == 0, text
    status, text = head.submit(*words[:-1], str(tmp_path / "undisturbed"))
    assert status == 0, text
    once, again = weights(tmp_path / "undisturbed"), weights(output)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def stop_when(head: Head, words: tuple[str, ...], true: object) -> str:
    """Submit, follow, and stop the job once a condition holds; what the submitter printed."""
    process = head.start("python", "jobs/submit.py", "--", *words)
    assert process.stdout is not None
    first = process.stdout.readline()
    found = SUBMITTED.search(first)
    assert found, first + process.communicate()[0]
    wait_until(true, process)
    stop_job(head, found[1])
    text, _ = process.communicate(timeout=800)
    assert process.returncode == 130, text
    assert read_job(head, found[1])["status"] == "STOPPED"
    return first + text


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_stop_it(head: Head, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    process = head.start("python", "jobs/submit.py", "--working-dir", str(tmp_path), "--", "wait.py")
    assert process.stdout is not None
    job = SUBMITTED.search(process.stdout.readline())
    assert job
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"the job goes on: follow it by `ray job logs --follow {job[1]}`, stop it by `ray job stop {job[1]}`" in text
    assert read_job(head, job[1])["status"] == "RUNNING"
    assert head.run("ray", "job", "stop", job[1])[0] == 0
    assert read_job(head, job[1])["status"] == "STOPPED"


@pytest.mark.soak
def test_the_job_server_refuses_what_the_preflight_refuses(head: Head, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("print('ran')\n")
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(101 << 20)
    status, text = head.run("ray", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "job.py")
    assert status != 0
    assert "Maximum request body size" in text
    (tmp_path / ".rayignore").write_text("*.bin\n")
    status, text = head.run("python", "jobs/submit.py", "--working-dir", str(tmp_path), "--", "job.py")
    assert (status, "ran" in text) == (0, True), text
