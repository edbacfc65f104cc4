"""The pages of every kind: how they read, made again from disk and S3, and in a real browser, wide and narrow.

tests/golden_pages holds each page as it reads. After a change that is meant, run this file with UPDATE_GOLDEN=1, which
writes them anew, and look at what git shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_browser import DESKTOP, PHONE, Browser, wait_until
from page_folders import (
    PAPER,
    make_evaluation,
    make_extraction,
    make_features,
    make_lost,
    make_search,
    make_training,
    make_trial,
    make_video,
    report_of,
)
from page_text import read_page

from jobs import report
from pipelines import storage
from pipelines.errors import DataError
from pipelines.search.trials import Book

LONG = "a-name-that-does-not-want-to-fit-" * 6
GOLDEN = Path(__file__).parent / "golden_pages"
AUDIT = (Path(__file__).parent / "page_audit.js").read_text()


def mixed_videos() -> list[dict]:
    """A still, a clipped, a low-rate and a lost video, and names that do not want to fit on a phone."""
    unbroken = {"id": "v" * 200, "class_name": "c" * 200, "error_kind": "k" * 200, "error_message": "m" * 900}
    return [
        make_video("wave~1") | {"source_fps": 12.0},
        make_video("wave~still", speed=0),
        make_lost("wave~gone", "missing"),
        make_video("clap~1", class_name="clap", speed=40.0, split="test"),
        make_lost("a", "quarantined", **unbroken),
        make_video("w" * 200, class_name=LONG),
    ]


def lost_videos() -> list[dict]:
    return [make_lost("a", "missing"), make_lost("b", "quarantined")]


def unlabelled_videos() -> list[dict]:
    """Two, one of which is a single frame, without flow and so without a preview."""
    photo = make_video("photo", class_name="") | {"num_frames": 1, "flow": b"", "flow_bytes": 0, "flow_mean": 0.0}
    return [make_video("clip", class_name=""), photo]


def one_trial(folder: Path) -> Path:
    book = Book(str(folder), PAPER)
    book.save(make_trial(0, [report_of(10, 0.3)]))
    return make_search(folder, book=book)


def begun(folder: Path) -> Path:
    make_training(folder, finished=False).joinpath("metrics.jsonl").unlink()
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "extraction": lambda folder: make_extraction(folder, mixed_videos()),
    "training": make_training,
    "evaluation": lambda folder: make_evaluation(folder, ["clap", LONG, "x" * 120, "jump", "wave", "push"]),
    "search": make_search,
    "features": lambda folder: make_features(folder, mixed_videos()),
    "extraction without labels": lambda folder: make_extraction(folder, unlabelled_videos()),
    "features of nothing": lambda folder: make_features(folder, lost_videos()),
    "extraction of nothing": lambda folder: make_extraction(folder, lost_videos()),
    "training just begun": begun,
    "evaluation of one class": lambda folder: make_evaluation(folder, ["wave"]),
    "evaluation of 60 classes": lambda folder: make_evaluation(folder, [f"{n} {LONG}" for n in range(60)]),
    "search of one trial": one_trial,
}
KINDS = list(MAKERS)[:5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with its report.html for every page."""
    made = {name: make(tmp_path_factory.mktemp("pages") / "folder") for name, make in MAKERS.items()}
    for folder in made.values():
        report.make_report(str(folder))
    return made


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "evaluation of 60 classes"])
def test_a_page_reads_as_it_should(folders: dict[str, Path], name: str) -> None:
    folder, golden = folders[name], GOLDEN / f"{name.replace(' ', '_')}.txt"
    text = re.sub(r"\S*/pages\d+/folder", "OUT", read_page((folder / "report.html").read_text()))
    text = re.sub(r"\b[\d.]+ k?B\b", "SOME BYTES", text)  # another x264 may need others
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text.splitlines() == golden.read_text().splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_made_again_is_the_same_from_disk_and_from_s3(folders: dict[str, Path], kind: str, s3: str) -> None:
    page = (folders[kind] / "report.html").read_text()
    for file in storage.list_files(str(folders[kind])):
        if not file.path.endswith("report.html"):
            storage.put(f"{s3}/out/{file.path}", (folders[kind] / file.path).read_bytes())
    uri = report.make_report(f"{s3}/out")
    assert uri == f"{s3}/out/report.html"
    assert storage.read_text(uri).replace(f"{s3}/out", str(folders[kind])) == page
    report.make_report(str(folders[kind]))
    assert (folders[kind] / "report.html").read_text() == page


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_needs_nothing_else(folders: dict[str, Path], name: str) -> None:
    page = (folders[name] / "report.html").read_text()
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert "default-src 'none'" in page
    urls = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert {url.partition(":")[0] for url in urls if ":" in url} == {"data"}


@pytest.mark.parametrize("file", [None, "run.json", "sweep.json", "evaluation.json", "dataset.json", "features.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "no JSON"])
def test_what_no_job_wrote_is_refused_in_a_sentence(tmp_path: Path, file: str | None, content: str) -> None:
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=f"^{tmp_path}.*" + ("" if file else "give the --output of a job")):
        report.make_report(str(tmp_path))


def test_mistakes_are_shown_with_what_each_network_thought(folders: dict[str, Path]) -> None:
    page = (folders["evaluation"] / "report.html").read_text()
    mistakes = page[page.index('id="mistakes"') : page.index('id="confusion"')]
    assert re.findall(r'<h3 class="data">(\w+)', mistakes) == ["clap", "jump"]
    assert mistakes.count("<video ") == 2 * 3
    first = mistakes[: mistakes.index("</article>")]
    assert re.findall(r"<th scope=\"col\">(\w[^<]*)</th>", first) == ["RGB", "flow", "added 1:1"]
    rows = re.findall(r'<tr[^>]*><th scope="row" title="(\w+)[^>]*>.*?</tr>', first, re.DOTALL)
    assert (rows[1], "<mark>true</mark>" in first) == ("clap", True)
    # Of six classes: a logit of 2 beside zeros is e² / (e² + 5) = 60 %, one of 3 is 80 %, 3 and 2 are 64 and 23 %.
    assert re.findall(r">(\d+%)<span class", first)[:6] == ["8%", "80%", "64%", "60%", "4%", "23%"]


def test_an_evaluation_whose_shards_are_gone_keeps_its_scores(folders: dict[str, Path], tmp_path: Path) -> None:
    made = make_evaluation(tmp_path / "gone", ["a", "b", "c"])
    (tmp_path / "gone" / "shards" / "dataset.json").unlink()
    page = Path(report.make_report(str(made))).read_text()
    assert "<video " not in page
    assert "No preview: " in page
    assert "<mark>true</mark>" in page


@pytest.mark.parametrize("name", MAKERS)
def test_a_browser_shows_all_of_it_wide_and_narrow_light_and_dark(
    folders: dict[str, Path], name: str, browser: Browser
) -> None:
    browser.show(folders[name] / "report.html", size=PHONE)
    for size, dark in ((PHONE, False), (PHONE, True), (DESKTOP, False), (DESKTOP, True)):
        browser.change(size=size, dark=dark)
        assert browser.run(AUDIT) == []
        assert browser.errors() == []


@pytest.mark.parametrize("kind", ["extraction", "evaluation"])
def test_previews_play_and_stop_by_mouse_and_keys(folders: dict[str, Path], kind: str, browser: Browser) -> None:
    browser.show(folders[kind] / "report.html", size=PHONE)
    video = "document.querySelector('video')"
    browser.run(f"{video}.scrollIntoView()")  # browsers play what is in sight
    wait_until(lambda: browser.run(f"return !{video}.paused && {video}.currentTime > 0"))
    browser.run(f"{video}.click()")
    assert browser.run(f"return {video}.paused")
    browser.run(f"{video}.focus()")
    top = browser.run("return scrollY")
    for key, paused in (("\ue007", False), (" ", True)):  # Enter, space
        browser.press(key)
        wait_until(lambda paused=paused: browser.run(f"return {video}.paused") == paused)
    assert browser.run("return scrollY") == top


def test_who_wants_no_motion_sees_none(folders: dict[str, Path], browser: Browser) -> None:
    browser.show(folders["extraction"] / "report.html", reduced_motion=True)
    browser.run("document.querySelector('video').scrollIntoView()")
    assert browser.run("return [...document.querySelectorAll('video')].every((v) => v.paused && !v.autoplay)")
