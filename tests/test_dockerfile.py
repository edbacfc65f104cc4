"""The image: what goes into it, as whom it runs, and that its steps make an environment in which a job runs.

No container engine is asked: its two stages are carried out in a bare virtual environment.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_docs import parse
from test_layout import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
# Instructions with their arguments, lines that go on joined, comments left out.
STEPS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    if line
]
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def allowed() -> set[str]:
    """What .dockerignore lets into the build."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*", "all that is not named stays out"
    return {line[1:] for line in lines if line.startswith("!")}


def test_all_that_runs_goes_in_and_nothing_else() -> None:
    assert allowed() == {*PACKAGES, "constraints.txt", "pyproject.toml"}


def test_the_base_is_pinned_to_the_python_that_is_tested() -> None:
    bases = [words for step, words in STEPS if step == "ARG" and words.startswith("BASE=")]
    tested = re.search(r"on Python (3\.\d+)", (ROOT / "constraints.txt").read_text())
    assert tested is not None
    assert len(bases) == 1
    assert re.fullmatch(rf"BASE=python:{re.escape(tested[1])}\.\d+-slim-bookworm", bases[0])
    assert {words.split()[0] for step, words in STEPS if step == "FROM"} == {"${BASE}"}


def test_it_runs_as_nobody_special_and_holds_no_secret() -> None:
    users = [words for step, words in STEPS if step == "USER"]
    assert users == ["1000"]  # by its number, which Kubernetes can tell from root's
    assert [words for step, words in STEPS if step in ("ARG", "ENV", "COPY", "ADD") and SECRET.search(words)] == []


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_the_commands_of_docker_run_parse(page: str) -> None:
    lines = re.findall(r"^ +(docker run .*)$", (ROOT / page).read_text().replace("\\\n", " "), re.MULTILINE)
    for words in map(shlex.split, lines):
        mounted = [words[place + 1].split(":")[1] for place, word in enumerate(words) if word == "--volume"]
        job = next(place for place, word in enumerate(words) if word.startswith("jobs/"))
        parse(words[job:])
        paths = [word for word in words[job + 1 :] if word.startswith("/")]
        assert all(any(path.startswith(folder) for folder in mounted) for path in paths)
    assert lines or page != "README.md"


def step_of(command: str) -> str:
    """The RUN step that holds a command."""
    (found,) = [words for step, words in STEPS if step == "RUN" and command in words]
    return found


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_packages_that_it_installs_suffice_for_an_extraction(tmp_path: Path) -> None:
    build, venv, app = (tmp_path / name for name in ("build", "venv", "app"))
    for folder in (build, app):
        folder.mkdir()
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, build)
    for name in allowed():
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, app / name)  # type: ignore[operator]
    # Where the index of PyTorch cannot be reached, another one may be named, or one on disk by pip's own settings.
    index = os.environ.get("CPU_INDEX", "https://pypi.org/simple")
    script = step_of("/opt/venv/bin/pip").replace("/opt/venv", str(venv))
    subprocess.run(
        ["sh", "-ec", script], cwd=build, check=True, env={**os.environ, "DEVICE": "cpu", "CPU_INDEX": index}
    )
    clean = {"PATH": f"{venv}/bin:/usr/bin:/bin", "PYTHONPATH": str(app), "HOME": str(tmp_path), "USER": "ray"}
    words = ["python", "jobs/extract_flow.py", "--output", str(tmp_path / "shards"), "--num-cpus", "2"]
    done = subprocess.run(words, cwd=app, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "shards" / "dataset.json").exists()
