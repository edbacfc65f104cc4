"""What is uploaded of a tree, and what is refused before anything is sent. test_ray_job.py has the rest."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
from fixtures_jobs import run_here
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

from jobs.submit import check_upload, list_upload, measure_archive
from pipelines.datasets.catalog import VIDEO_EXTENSIONS
from pipelines.errors import SubmitError

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_the_project_is_uploaded_whole_and_small() -> None:
    files = list_upload(ROOT)
    code = [
        path.relative_to(ROOT).as_posix()
        for room in ("jobs", "pipelines", "models")
        for path in (ROOT / room).rglob("*.py")
    ]
    assert {*code, "pyproject.toml", "pipelines/pages/templates/style.css"} <= files.keys()
    assert not [name for name in files if name.startswith((".git/", ".venv/", "out/"))]
    assert measure_archive(files) < 5 << 20


def test_data_dropped_into_the_tree_stays_here(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".rayignore", tmp_path)
    write(tmp_path, "jobs/train.py", "lists/train.csv", "lists/deep/classInd.txt", "flow_imagenet.pt")
    kept = list_upload(tmp_path).keys()
    assert kept == {".rayignore", "jobs/train.py", "lists/train.csv", "lists/deep/classInd.txt", "flow_imagenet.pt"}
    write(tmp_path, ".git/objects/ab/cd", ".venv/lib/a.py", "data/a.txt", "lists/data/b.txt", "out/debug/c.txt")
    write(tmp_path, *(f"clips/deep/video{suffix}" for suffix in VIDEO_EXTENSIONS))
    write(tmp_path, "OUT/shards/train-00000.parquet", "OUT/shards/train-00000.tar", "k400.tar.gz", "a/b/c.zip")
    write(tmp_path, "RUN/checkpoints/step-1/training.pt", "RUN/initial/weights.safetensors", "jobs/__pycache__/x.pyc")
    assert list_upload(tmp_path).keys() == kept


def test_gitignore_counts_too_in_every_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "scratch/b.py", "deep/scratch/c.py", "deep/notes.txt")
    (tmp_path / ".gitignore").write_text("/scratch/\n")
    (tmp_path / "deep" / ".rayignore").write_text("notes.txt\n")
    assert list_upload(tmp_path).keys() == {".gitignore", "a.py", "deep/.rayignore", "deep/scratch/c.py"}


def test_the_measure_is_that_of_the_archive_that_ray_makes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    write(tree, "jobs/train.py", "lists/train.csv", "größe.txt", "data/x.bin", "a.mp4")
    shutil.copy(ROOT / ".rayignore", tree)
    files = list_upload(tree)
    archive = tmp_path / "package.zip"
    excludes = [".git", ".venv", "venv", "__pycache__"]
    assert get_uri_for_directory(str(tree), include_gitignore=True, excludes=excludes)
    create_package(str(tree), archive, include_gitignore=True, excludes=excludes)
    assert set(ZipFile(archive).namelist()) - {"data"} == files.keys()
    assert abs(archive.stat().st_size - measure_archive(files)) < 1000


def test_a_tree_that_is_too_large_is_refused_naming_the_largest_files(tmp_path: Path) -> None:
    write(tmp_path, "job.py", "small.txt")
    for name, megabytes in (("weights.bin", 60), ("deep/features.h5", 70), ("third.bin", 20), ("fourth.bin", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(megabytes * 1_000_000)
    done = run_here("submit", "--working-dir", tmp_path, "--", "job.py")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: \S+ would upload 160 MB in 6 files, and a job server takes 105 MB: name what the job does not need in "
        r"\.rayignore; the largest are deep/features\.h5 \(70 MB\), weights\.bin \(60 MB\), third\.bin \(20 MB\)\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("folder", "job", "message"),
    [("", "jobs/trian.py", "jobs/trian.py is not among the 1 file"), ("nowhere", "a.py", "nowhere is no folder")],
)
def test_what_cannot_run_is_not_sent(tmp_path: Path, folder: str, job: str, message: str) -> None:
    write(tmp_path, "a.py")
    with pytest.raises(SubmitError, match=message):
        check_upload(tmp_path / folder, list_upload(tmp_path / folder), job)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no job is named"),
        (("--address", "http://127.0.0.1:1", "--", "jobs/train.py"), "no job server at http://127.0.0.1:1"),
    ],
)
def test_one_sentence_where_nothing_can_be_submitted(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    """And what its caller wants to hear from libraries is as it was."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    done = run_here("submit", *words)
    assert logging.root.manager.disable == logging.INFO
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
