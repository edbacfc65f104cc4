"""The pages of docs/: the flags are today's."""

from __future__ import annotations

from pathlib import Path

from docs import generate_cli

ROOT = Path(__file__).resolve().parents[1]


def test_the_flags_on_the_page_are_those_of_the_jobs() -> None:
    assert generate_cli.PAGE.read_text() == generate_cli.make_page(), "run python docs/generate_cli.py"


def test_every_job_is_on_the_page() -> None:
    commands = {path.stem for path in (ROOT / "jobs").glob("*.py") if "__main__" in path.read_text()}
    assert commands == set(generate_cli.JOBS)
