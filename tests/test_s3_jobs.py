"""The jobs on s3:// as users run them, through a network that fails: equal bytes, clear errors, no secret anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import s3fs
import tyro
from faulty_s3 import running_proxy
from fixtures_features import save_networks
from fixtures_jobs import run_here
from seaweed import Seaweed
from test_extract_features import Work

from jobs.extract_features import ExtractFeatures
from pipelines import storage
from pipelines.media.decoder_process import ROOT

MADE = ("features", "windows", "commits", "videos", "quarantine", "plan")  # what does not depend on the clock
SHARE = 0.04  # of the extraction's requests that something happens to


class Jobs(NamedTuple):
    """What the jobs left behind."""

    folder: str  # s3://
    ray: Path  # session folder of their Ray, logs included
    printed: dict[str, str]  # by job
    hashes: dict[str, str]  # of the shards
    faults: int


RunJob = Callable[..., str]


@contextmanager
def jobs_elsewhere() -> Iterator[RunJob]:
    """Runs jobs in another process, on one Ray: it, its Ray and their logs have this moment's environment."""
    words = [sys.executable, str(ROOT / "tests" / "jobs_of_lines.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Said before that process imports ray, as the jobs do: sockets on loopback, which ask for a token.
    said = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, **said}, **pipes) as process:  # type: ignore[call-overload]

        def run(*flags: str) -> str:
            print(json.dumps(flags), file=process.stdin, flush=True)
            status, text = json.loads(process.stdout.readline())
            assert status == 0, f"{flags}\n{text}"
            return str(text)

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def jobs(motion_shards: str, seaweed: Seaweed, network_folder: Path) -> Iterator[Jobs]:
    """Extraction and features (while faults are drawn from a seed), verification, training, evaluation, on s3://."""
    folder = "s3://data/jobs"
    with (
        # Ray's sockets lie in its folder, and their names may be 107 bytes long.
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray,
        pytest.MonkeyPatch.context() as patch,
        running_proxy(seaweed.endpoint) as proxy,
    ):
        for name, value in {**seaweed.environment(proxy.endpoint), "RAY_TMPDIR": ray}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        upload(Path(motion_shards).parent, folder)
        data, flow = ("--data", f"{folder}/shards"), ("--stream", "flow", "--preset", "debug")
        with jobs_elsewhere() as run:
            proxy.share = SHARE
            printed = {"extract_flow": run("extract_flow", *extraction(folder), "--videos-per-shard", "5")}
            proxy.share, faults = 0.0, proxy.done.total() - proxy.done["passed"]
            printed["verify"] = run("verify", f"{folder}/shards", "--videos", f"{folder}/videos", "--samples", "3")
            made = hashes(f"{folder}/shards")
            storage.delete(f"{folder}/shards/shards/train-00000.parquet")
            printed["train"] = run(
                "train", *data, *flow, "--num-workers", "1", "--steps", "8", "--output", f"{folder}/run"
            )
            score = ("--flow", f"{folder}/run", "--num-workers", "1", "--output", f"{folder}/evaluation")
            printed["evaluate"] = run("evaluate", *data, *score)
            networks = save_networks(network_folder)
            proxy.share = SHARE
            printed["extract_features"] = run("extract_features", *features(folder, networks))
            proxy.share = 0.0
        yield Jobs(folder, Path(ray), printed, made, faults)
    s3fs.S3FileSystem.clear_instance_cache()


def upload(source: Path, folder: str) -> None:
    storage.put(f"{folder}/list.csv", (source / "list.csv").read_bytes())
    for path in (source / "videos").rglob("*.mp4"):
        storage.put(f"{folder}/videos/{path.relative_to(source / 'videos')}", path.read_bytes())


def extraction(folder: str, output: str = "") -> tuple[str, ...]:
    """The flags of one."""
    videos = ("--videos", f"{folder}/videos", "--annotations", f"{folder}/list.csv", "--short-side", "40")
    return (*videos, "--output", output or f"{folder}/shards")


def features(folder: str, networks: list[str], output: str = "") -> tuple[str, ...]:
    """The flags of a run over features of the test split."""
    windows = ("--window", "16", "--stride", "4", "--layout", "npy", "--split", "test", "--videos-per-shard", "3")
    videos = ("--videos", f"{folder}/videos", "--annotations", f"{folder}/list.csv", *networks)
    return (*videos, *windows, "--output", output or f"{folder}/features")


def hashes(output: str) -> dict[str, str]:
    """Of whatever of a data set does not depend on the clock."""
    paths = (file.path for file in storage.list_files(output))
    kept = [path for path in paths if path.startswith(("shards/", "commits/")) or path.endswith(".parquet")]
    kept += ["dataset.json", "plan.json"]
    return {path: hashlib.sha256(storage.read_bytes(storage.join(output, path))).hexdigest() for path in kept}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_s3_and_disk_hold_the_same_bytes_though_the_network_fails(jobs: Jobs, motion_shards: str) -> None:
    assert jobs.faults >= 3
    assert jobs.hashes == hashes(motion_shards)
    assert not storage.exists(f"{jobs.folder}/shards/lock.json")


@pytest.mark.slow
def test_features_on_s3_and_disk_are_the_same_bytes(
    jobs: Jobs, motion_shards: str, network_folder: Path, tmp_path: Path
) -> None:
    networks = [word for stream in ("rgb", "flow") for word in (f"--{stream}", str(network_folder / stream))]
    flags = features(str(Path(motion_shards).parent), networks, str(tmp_path / "out"))
    Work(tyro.cli(ExtractFeatures, args=flags, config=(tyro.conf.OmitArgPrefixes,))).make_here()
    made = {path for path in storage.list_files(f"{jobs.folder}/features") if path.path.startswith(MADE)}
    assert len(made) > 10
    for file in made:
        here = (tmp_path / "out" / file.path).read_bytes()
        assert storage.read_bytes(f"{jobs.folder}/features/{file.path}") == here, file.path
    assert not storage.exists(f"{jobs.folder}/features/lock.json")


@pytest.mark.slow
def test_verify_checks_a_data_set_on_s3(jobs: Jobs) -> None:
    assert jobs.printed["verify"].count("px mean") == 3
    assert f"ok: {jobs.folder}/shards" in jobs.printed["verify"]


@pytest.mark.slow
def test_with_a_shard_gone_training_and_evaluation_go_on_and_say_so(jobs: Jobs) -> None:
    assert re.search(r"step +8 .*clips could not be decoded", jobs.printed["train"])
    assert "not decoded: train~" in jobs.printed["train"]
    assert "evaluated   6 of 8 videos; 1 missing, 1 quarantined, 0 failed" in jobs.printed["evaluate"]


@pytest.mark.slow
def test_no_secret_is_printed_or_written(jobs: Jobs, seaweed: Seaweed) -> None:
    texts = {name: text.encode() for name, text in jobs.printed.items()}
    texts |= {path.path: storage.read_bytes(f"{jobs.folder}/{path.path}") for path in storage.list_files(jobs.folder)}
    logs = [path for path in jobs.ray.rglob("*") if path.is_file() and not path.is_symlink()]
    texts |= {str(path): path.read_bytes() for path in logs}
    assert any(name.endswith("run/run.json") for name in texts)
    assert any("worker" in path.name and path.suffix == ".out" for path in logs)
    for secret in seaweed.credentials:
        assert [name for name, text in texts.items() if secret.encode() in text] == []


@pytest.mark.parametrize(
    ("environment", "output", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong/secret/of/tests/0123456789"}, "s3://data/x", "s3://data/"),
        ({"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG1"}, "s3://data/x", "s3://data/"),
        ({}, "s3://no-such-bucket/x", "cannot write to s3://no-such-bucket/x"),
    ],
)
def test_what_is_wrong_with_s3_is_one_sentence(
    weed: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], output: str, said: str
) -> None:
    storage.put(f"{weed}/videos/train/a.mp4", b"x")
    storage.put(f"{weed}/list.csv", b"path,label\ntrain/a.mp4,a\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    job = run_here("extract_flow", *extraction(weed, output))
    assert job.returncode == 1
    assert job.stderr.startswith("error: ")
    assert said in job.stderr
    assert not any(value in job.stdout + job.stderr for value in environment.values())


@pytest.mark.soak
@pytest.mark.parametrize(
    ("job_name", "more", "working"),
    [("train", ("--num-workers", "1"), "step "), ("tune", ("--trials", "2", "--num-gpus", "0"), "\noutput  ")],
)
def test_a_run_whose_output_another_took_over_ends_with_one_sentence(
    weed: str, motion_shards: str, tmp_path: Path, job_name: str, more: tuple[str, ...], working: str
) -> None:
    flags = ("--data", motion_shards, "--stream", "rgb", "--preset", "debug", "--steps", "100000", *more)
    command = [sys.executable, str(ROOT / "jobs" / f"{job_name}.py"), *flags, "--output", f"{weed}/run"]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        while working not in (tmp_path / "log").read_text():
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        theirs = json.dumps({"host": "elsewhere", "pid": 4711, "token": "theirs", "beat": time.time()}).encode()
        storage.put(f"{weed}/run/lock.json", theirs)
        assert job.wait(120) == 1
    finally:
        job.kill()
    said = (tmp_path / "log").read_text().strip().splitlines()
    assert said[-1].startswith(f"error: {weed}/run was taken over by another run")
    assert not any("Traceback" in line for line in said)
    assert storage.read_bytes(f"{weed}/run/lock.json") == theirs
    assert not storage.exists(f"{weed}/run/result.json")
