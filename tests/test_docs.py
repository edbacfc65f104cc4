"""The pages of docs/ hold together: links, files and Python names exist, commands parse, the flags are today's."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tyro
from shard_rows import convention_of, encode_shard, make_row

from docs import generate_cli
from pipelines.datasets.shards import ShardSettings
from pipelines.media.codec import CodecSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HAND_WRITTEN = [page for page in PAGES if page.name != "cli.md"]


def test_the_flags_on_the_page_are_those_of_the_jobs() -> None:
    assert generate_cli.PAGE.read_text() == generate_cli.make_page(), "run python docs/generate_cli.py"


def test_every_job_is_on_the_page() -> None:
    commands = {path.stem for path in (ROOT / "jobs").glob("*.py") if "__main__" in path.read_text()}
    assert commands == set(generate_cli.JOBS)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:\w+/)+[\w.-]+\.(?:py|md|toml|yaml|sh))`", page.read_text())
    places = (ROOT, ROOT / "pipelines")
    missing = [name for name in named if "NAME" not in name and not any((place / name).exists() for place in places)]
    assert [name for name in missing if not name.startswith(("tools/", "demo/"))] == []  # those of other projects


def test_python_names_on_the_api_page_exist() -> None:
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def test_every_page_is_in_the_site() -> None:
    configured = (ROOT / "zensical.toml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f'"{page}"' not in configured] == []


class Parsed(BaseException):
    """The flags are good; what comes after is not run."""


def parse(words: list[str]) -> None:
    """Take a job's words as the job does, checks of its settings included."""
    real = tyro.cli

    def cli(target: Callable[..., Any], **kwargs: Any) -> None:
        real(target if isinstance(target, type) else wraps(target)(lambda *_, **__: None), **kwargs)
        raise Parsed

    with generate_cli.started_as(*words), mock.patch("tyro.cli", cli), pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def commands_of(page: Path) -> list[list[str]]:
    """Words after `python` of the jobs that a page calls, in blocks and in code within a line."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ *((?:python jobs/|ray job submit ).*)$", text, re.MULTILINE)
    lines += re.findall(r"`(python jobs/[^`]+)`", text)
    commands = [
        shlex.split(line.replace("$(", "").replace(")", ""), comments=True) for line in lines if "…" not in line
    ]
    parts: list[list[str]] = []
    for words in commands:
        dashes = words.index("--") if "--" in words else len(words)
        parts += [words[:dashes], words[dashes + 1 :]]
    return [words[words.index(job) :] for words in parts for job in words if re.fullmatch(r"jobs/[a-z_]+\.py", job)]


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for words in commands_of(page):
        parse(words)


def test_commands_are_found() -> None:
    found = [words[0] for page in HAND_WRITTEN for words in commands_of(page)]
    assert len(found) > 35
    assert {f"jobs/{job}.py" for job in generate_cli.JOBS} - set(found) <= {"jobs/demo.py"}


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_benchmarks_take_the_flags_that_are_named(page: Path) -> None:
    for command in set(re.findall(r"`python (benchmarks/[^`]+)`", page.read_text())):
        script, *words = command.split()
        assert (ROOT / script).exists()
        flags = [word for word in words if word.startswith("--")]
        assert not flags or all(flag in generate_cli.print_help(script) for flag in flags), command


def test_the_tutorials_code_reads_a_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole tutorial is run by a test that takes minutes; this is its part that a renamed field breaks."""
    (code,) = re.findall(
        r'python -c "\n(from pipelines\.datasets\.shards .*?)"\n',
        (ROOT / "docs" / "tutorial.md").read_text(),
        re.DOTALL,
    )
    codec = CodecSettings()
    shard = tmp_path / "test-00000.parquet"
    shard.write_bytes(encode_shard([make_row(codec)], ShardSettings(), convention_of(codec)))
    exec(re.sub(r"'out/[^']*\.parquet'", repr(str(shard)), code), {})
    assert capsys.readouterr().out == "video0 (4, 16, 24, 3) uint8 (3, 16, 24, 2) float32\n"
