"""The jobs on s3:// as users run them, through a network that fails: equal bytes, clear errors, no secret anywhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import s3fs
from faulty_s3 import running_proxy
from seaweed import Seaweed

from pipelines import storage
from pipelines.media.decoder_process import ROOT

SHARE = 0.04  # of the extraction's requests that something happens to


class Jobs(NamedTuple):
    """What the jobs left behind."""

    folder: str  # s3://
    ray: Path  # session folders of their Rays, logs included
    printed: dict[str, str]  # by job
    faults: int


def run_job(name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"jobs/{name}.py", *flags]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def jobs(motion_shards: str, seaweed: Seaweed) -> Iterator[Jobs]:
    """Extraction (while faults are drawn from a seed), training, evaluation and verification, all on s3://."""
    folder = "s3://data/jobs"
    # Ray's sockets lie in its folder, and their names may be 107 bytes long.
    ray = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch, running_proxy(seaweed.endpoint) as proxy:
        for name, value in {**seaweed.environment(proxy.endpoint), "RAY_TMPDIR": str(ray)}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        upload(Path(motion_shards).parent, folder)
        data = ("--data", f"{folder}/shards")
        proxy.share = SHARE
        done = {"extract_flow": extract(folder, "--videos-per-shard", "5")}
        proxy.share, faults = 0.0, proxy.done.total() - proxy.done["passed"]
        train = ("--stream", "flow", "--preset", "debug", "--num-workers", "1", "--output", f"{folder}/run")
        done["train"] = run_job("train", *data, *train)
        score = ("--flow", f"{folder}/run", "--num-workers", "1", "--output", f"{folder}/evaluation")
        done["evaluate"] = run_job("evaluate", *data, *score)
        done["verify"] = run_job("verify", f"{folder}/shards", "--videos", f"{folder}/videos", "--samples", "3")
        for name, job in done.items():
            assert job.returncode == 0, name + job.stdout + job.stderr
        yield Jobs(folder, ray, {name: job.stdout + job.stderr for name, job in done.items()}, faults)
    s3fs.S3FileSystem.clear_instance_cache()
    shutil.rmtree(ray)


def upload(source: Path, folder: str) -> None:
    storage.put(f"{folder}/list.csv", (source / "list.csv").read_bytes())
    for path in (source / "videos").rglob("*.mp4"):
        storage.put(f"{folder}/videos/{path.relative_to(source / 'videos')}", path.read_bytes())


def extract(folder: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    videos = ("--videos", f"{folder}/videos", "--annotations", f"{folder}/list.csv", "--short-side", "40")
    return run_job("extract_flow", *videos, "--output", f"{folder}/shards", *flags, **environment)


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
    assert hashes(f"{jobs.folder}/shards") == hashes(motion_shards)


@pytest.mark.slow
def test_verify_checks_a_data_set_on_s3(jobs: Jobs) -> None:
    assert jobs.printed["verify"].count("px mean") == 3
    assert f"ok: {jobs.folder}/shards" in jobs.printed["verify"]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "output", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong/secret/of/tests/0123456789"}, "s3://data/x", "s3://data/"),
        ({"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG1"}, "s3://data/x", "s3://data/"),
        ({}, "s3://no-such-bucket/x", "cannot write to s3://no-such-bucket/x"),
    ],
)
def test_what_is_wrong_with_s3_is_one_sentence(
    jobs: Jobs, weed: str, environment: dict[str, str], output: str, said: str
) -> None:
    job = extract(jobs.folder, "--output", output, **environment)
    assert job.returncode == 1
    assert job.stderr.startswith("error: ")
    assert said in job.stderr
    assert "Traceback" not in job.stdout + job.stderr
    assert not any(value in job.stdout + job.stderr for value in environment.values())
