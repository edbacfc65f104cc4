"""The command as people run it, on videos it finds or makes; interrupted, in a process of its own, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from extracted import hashes
from fixtures_jobs import NO_GPUS, run_here, succeed
from test_plan import catalog_of, commit, plan_of

from jobs import extract_features, extract_flow
from jobs.extract_flow import ExtractFlow
from jobs.extraction import place, print_catalog
from pipelines.datasets import shards
from pipelines.datasets.catalog import read_catalog
from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.datasets.records import read_dataset
from pipelines.errors import OutputLockedError, SettingsError
from pipelines.lock import OutputLock

ROOT = Path(__file__).resolve().parents[1]
JOB = str(ROOT / "jobs" / "extract_flow.py")
FLAGS = ("--short-side", "64", "--videos-per-shard", "2", "--codec", "h264")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_motion_videos(folder, videos_per_class=2, seed=2, num_frames=60, size=(64, 48))
    write_broken_videos(folder / "train" / "broken")
    return folder


def start(*flags: str | Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, JOB, *map(str, flags)]
    return subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*flags: str | Path, cwd: Path, status: int = 0, **environment: str) -> str:
    """Run the job to its end and return what it said."""
    process = start(*flags, cwd=cwd, **environment)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def wait_for_commits(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many shards are committed, while the job runs."""
    deadline = time.monotonic() + 200
    while len(list((output / "commits").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def extract(videos: Path, output: Path, *more: str) -> str:
    """What the job prints, run in this process to its end."""
    return succeed("extract_flow", "--videos", videos, "--output", output, *FLAGS, *NO_GPUS, *more)


@pytest.fixture(scope="module")
def undisturbed(ray_here: None, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    extract(videos, folder / "out")
    return folder / "out"


def test_help_explains_every_flag() -> None:
    text = succeed("extract_flow", "--help")
    for flag in ("--videos", "--output", "--flow-backend", "--format", "--videos-per-shard", "--fps", "--short-side",
                 "--codec", "--limit", "--split", "--num-cpus", "--retry-quarantined", "--dry-run"):  # fmt: skip
        assert flag in text


@pytest.mark.parametrize(
    ("status", "flags", "words"),
    [
        (1, ("--videos", "nowhere", "--output", "out"), ("no videos folder", "nowhere")),
        (1, ("--split", "val"), ("val", "train", "test")),
        (2, ("--videos", "nowhere"), ("--output is not",)),
        (2, ("--short-side", "255"), ("--short-side is 255", "even")),
        (2, ("--num-cpus", "0"), ("--num-cpus is 0",)),
        (2, ("--gpus-per-actor", "0"), ("--gpus-per-actor is 0",)),
        (2, ("--gpus-per-actor", "1.5"), ("--gpus-per-actor is 1.5", "a whole number")),
        (2, ("--layout", "flat", "--annotations", "list.csv"), ("--layout flat", "leave one out")),
        (2, ("--codec", "mpeg2"), ("--codec", "mpeg2", "h264", "lossless", "jpeg")),
    ],
)
def test_a_wrong_flag_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("extract_flow", *flags)
    text = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == status
    assert all(word in text for word in words), text


def test_what_was_found_is_shown_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("wave/1.mp4", "wave/2.mp4", "kick/1.mp4", "run/1.mp4", "sit/1.mp4", "3.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    print_catalog("given", read_catalog(str(tmp_path)))
    assert capsys.readouterr().out.splitlines() == [
        "videos      given: 6 videos (all 6), 4 classes, from a folder per class",
        "classes     kick: 1, run: 1, sit: 1, … (4 in all); 1 without a label",
        "left out    1 file without the ending of a video: 1 × .txt",
    ]


@pytest.mark.slow
@pytest.mark.soak
def test_without_arguments_it_extracts_videos_of_its_own(tmp_path: Path) -> None:
    text = run(cwd=tmp_path)
    described = read_dataset(str(tmp_path / "out" / "debug" / "shards"))
    assert sum(shard.rows for shard in described.shards) == 18
    assert "report.html" in text
    assert (tmp_path / "out" / "debug" / "shards" / "report.html").stat().st_size > 1000


def test_a_second_run_finds_nothing_to_do_and_leaves_the_same_bytes(undisturbed: Path, videos: Path) -> None:
    before = hashes(undisturbed)
    assert "nothing: 8 shards of" in extract(videos, undisturbed)
    assert hashes(undisturbed) == before


@pytest.mark.parametrize("more", [(), ("--verify",), ("--flow-backend", "cpu"), ("--dry-run",)])
def test_what_needs_no_ray_starts_none(
    undisturbed: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr("jobs.extraction.connect", lambda **_: pytest.fail("Ray was started"))
    extract(videos, undisturbed, *more)


def test_a_page_that_was_lost_is_drawn_again(undisturbed: Path, videos: Path) -> None:
    page = undisturbed / "report.html"
    drawn = page.read_bytes()
    page.unlink()
    extract(videos, undisturbed)
    assert page.read_bytes() == drawn


def test_an_output_goes_on_with_the_backend_that_it_was_begun_with(undisturbed: Path, tmp_path: Path) -> None:
    """Whatever GPUs have come or gone since."""
    config = ExtractFlow(videos="videos", output="shards")
    assert place(config, str(tmp_path), lambda: 2)[0] == "torch"
    assert place(config, str(undisturbed), lambda: 2)[0] == "cpu"
    (tmp_path / "plan.json").write_text('{"settings": {"kernel": "torch 2.13 sm_90"}}')
    backend, placement = place(config, str(tmp_path), lambda: 2)
    assert (backend, placement.flow_actors) == ("torch", 2)
    with pytest.raises(SettingsError, match="the output was begun on GPUs, and 0 GPUs"):
        place(replace(config, num_gpus=0), str(tmp_path), lambda: 2)
    for other in ("[]", '{"settings": {"kernel": "another"}}'):
        (tmp_path / "plan.json").write_text(other)
        assert place(config, str(tmp_path), lambda: 2)[0] == "torch"


def test_other_settings_on_the_same_output_are_refused_by_name(undisturbed: Path, videos: Path) -> None:
    flags = ("--videos", videos, "--output", undisturbed, *FLAGS, "--fps", "12.5", *NO_GPUS)
    done = run_here("extract_flow", *flags)
    assert done.returncode == 1
    assert "settings.decode.fps: 25.0 there, 12.5 now" in done.stderr


def test_webdataset_holds_the_same_videos(undisturbed: Path, videos: Path, tmp_path: Path) -> None:
    extract(videos, tmp_path / "out", "--format", "webdataset")
    described = read_dataset(str(tmp_path / "out"))
    tar_rows = [row for shard in described.shards for row in shards.read_rows(str(tmp_path / "out" / shard.file))]
    parquet = read_dataset(str(undisturbed)).shards
    parquet_rows = [row for shard in parquet for row in shards.read_rows(str(undisturbed / shard.file))]
    assert tar_rows == parquet_rows


def test_dry_run_estimates_and_writes_nothing(ray_here: None, videos: Path, tmp_path: Path) -> None:
    assert "of one CPU" in extract(videos, tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.soak
def test_ut_interaction_loses_nothing(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "ut_interaction"
    run("--videos", folder, "--annotations", folder / "annotations.csv", "--output", "out", "--short-side", "64",
        "--codec", "h264", "--videos-per-shard", "8", cwd=tmp_path)  # fmt: skip
    splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
    assert {name: (counts["expected"], counts["ok"]) for name, counts in splits.items()} == {
        "train": (60, 60),
        "test": (60, 60),
    }


@pytest.mark.slow
def test_hostile_files_end_in_a_shard_or_in_quarantine(ray_here: None, shared_data: Path, tmp_path: Path) -> None:
    extract(shared_data / "decoder", tmp_path / "out", "--videos-per-shard", "32")
    splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
    total = {name: sum(counts[name] for counts in splits.values()) for name in ("expected", "ok", "quarantined")}
    assert total["expected"] == total["ok"] + total["quarantined"] == 52
    assert total["quarantined"] == 11  # eight without video, two without pictures, one that is mostly damaged


# What is Linux's own, hidden from our code but not from Ray, which knows the system that it runs on.
NOT_LINUX = """
import fcntl, os, pathlib, resource
def refuse(which, limits, set_limit=resource.setrlimit):
    if which == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    set_limit(which, limits)
resource.setrlimit = refuse
for module, names in ((fcntl, ["F_SETPIPE_SZ"]), (os, [n for n in dir(os) if n.startswith("SCHED_")])):
    for name in names:
        delattr(module, name)
del os.sched_getscheduler, os.sched_setscheduler, os.sched_param
def hide(method):
    def hidden(self, *args, **kwargs):
        if str(self).startswith(("/proc", "/dev/shm", "/sys")):
            raise FileNotFoundError(str(self))
        return method(self, *args, **kwargs)
    return hidden
for name in ("open", "read_text", "read_bytes", "iterdir", "readlink"):
    setattr(pathlib.Path, name, hide(getattr(pathlib.Path, name)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "ends", [(signal.SIGINT, signal.SIGKILL), pytest.param((signal.SIGTERM,), marks=pytest.mark.soak)]
)
def test_a_stopped_run_goes_on_to_the_bytes_of_an_undisturbed_one_also_where_there_is_no_linux(
    undisturbed: Path, videos: Path, tmp_path: Path, ends: tuple[signal.Signals, ...]
) -> None:
    """While it runs it refuses a second, and what was committed before it was stopped is not made again."""
    out = tmp_path / "out"
    flags = ("--videos", videos, "--output", out, *FLAGS)
    kept: dict[Path, int] = {}
    for how in ends:
        process = start(*flags, "--num-cpus", "1", cwd=tmp_path)
        wait_for_commits(out, len(kept) + 1, process)
        second = run_here("extract_flow", *flags)
        assert second.returncode == 1
        assert str(process.pid) in second.stderr
        assert "another run" in second.stderr
        process.send_signal(how)
        said, _ = process.communicate(timeout=200)  # a busy machine is no failure
        assert ("stopped; the same command goes on" in said) == (how != signal.SIGKILL)
        assert not (out / "dataset.json").exists()
        before, kept = kept, {path: path.stat().st_mtime_ns for path in (out / "commits").glob("*.json")}
        assert before.items() <= kept.items()
    (tmp_path / "sitecustomize.py").write_text(NOT_LINUX)
    said = run(*flags, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "does not limit the memory of decoders" in said
    assert hashes(out) == hashes(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("job", ["flow", "features"])
def test_a_run_whose_lock_is_lost_settles_nothing_at_its_end(tmp_path: Path, job: str) -> None:
    """What is pending is that of the run which took the output over."""
    plan = plan_of(catalog_of({"train": 1}), tmp_path)
    commit(plan, "train-00000", {"train0": "quarantined"})
    pending = tmp_path / "commits" / "train-00000.0123456789abcdef.pending"
    pending.write_bytes((tmp_path / "commits" / "train-00000.json").read_bytes())
    lock = OutputLock(str(tmp_path), "token")
    lock.lost = True
    source: Any = SimpleNamespace(config=SimpleNamespace(output="out"), describe=lambda kernel: {})
    given: Any = plan
    finish = {
        "flow": partial(extract_flow.finish, plan, "out"),
        "features": partial(extract_features.finish, source, given),
    }
    with pytest.raises(OutputLockedError, match="taken over by another run"):
        finish[job](lock)
    assert pending.exists()
    assert not (tmp_path / "videos.parquet").exists()
