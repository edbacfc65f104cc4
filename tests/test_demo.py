"""The demo, with a few videos and steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_jobs import run_here

ROOT = Path(__file__).resolve().parents[1]


def test_make_demo_is_this_job() -> None:
    # Under `make test` make is called from make, which then says where it is.
    command = ["make", "--no-print-directory", "--dry-run", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("bin/python jobs/demo.py")


def test_too_few_videos_are_refused() -> None:
    done = run_here("demo", "--videos-per-class", "2")
    assert done.returncode != 0
    assert "give at least 3 and 2" in " ".join((done.stdout + done.stderr).replace("│", " ").split())


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_it_goes_the_whole_way(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/demo.py", "--output", str(tmp_path), "--videos-per-class", "3", "--steps", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "logits added 1:1" in done.stdout
    pages = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ") and "report.html" in line]
    assert len(pages) >= 3
    assert all(Path(page).exists() for page in pages)
