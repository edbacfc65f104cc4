"""The pages on presets: the flags they name are the presets', and their loading code gives the shapes that they say."""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.input_spec import STREAMS
from pipelines.features.layouts import VideoFacts, make_files
from pipelines.features.presets import PRESETS
from pipelines.features.settings import FeatureSettings
from pipelines.features.windows import Windows, count_frames

PAGES = Path(__file__).resolve().parents[1] / "docs" / "features"
NUM_FRAMES = 389  # at 30 frames a second
IDS = {"thumos14": "video_test_0000004", "thumos14-25fps": "video_test_0000004", "ms-tcn": "S1_Cheese_C1"}
Names = dict[str, Any]


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text()


def write_features(folder: Path, name: str) -> None:
    """The files of a video of NUM_FRAMES frames as the preset's layout has them, with random vectors."""
    settings = PRESETS[name].settings  # type: ignore[index]
    num_frames, fps = (NUM_FRAMES, 30.0) if settings.fps == "native" else (NUM_FRAMES * 25 // 30, 25.0)
    windows = Windows.of(settings, 1)
    shape = [windows.count(count_frames(settings, num_frames)), *([settings.crops] * (settings.crops > 1)), 1024]
    features = {stream: np.random.default_rng(0).normal(size=shape).astype(np.float32) for stream in STREAMS}
    video = VideoFacts(id=IDS.get(name, "ID"), num_frames=num_frames, fps=fps)
    for array in make_files(settings, windows, video, features):
        (folder / array.path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / array.path).open("wb") as file:
            array.write(file)


def load(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """What the names of a page's loading code hold after it has run beside an output of the job."""
    write_features(folder / "OUT" / "features", name)
    (folder / "groundTruth").mkdir()
    (folder / "groundTruth" / "S1_Cheese_C1.txt").write_text("background\n" * (NUM_FRAMES - 2))
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"^```python\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL)
    names: Names = {}
    exec(textwrap.dedent(code), names)
    return names


@pytest.mark.parametrize("name", PRESETS)
def test_a_page_names_the_flags_that_its_preset_stands_for(name: str) -> None:
    settings = PRESETS[name].settings  # type: ignore[index]
    named = [field.name for field in fields(FeatureSettings) if field.name != "streams"]
    flags = " ".join(f"--{field.replace('_', '-')} {getattr(settings, field)}" for field in named)
    assert f"\n    {flags}\n" in page(name)
    assert f"--preset {name} " in " ".join(page(name).split())


@pytest.mark.parametrize("name", PRESETS)
def test_the_overview_leads_to_each_page(name: str) -> None:
    assert f"[`{name}`]({name}.md)" in page("overview")


def test_actionformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load("thumos14", tmp_path, monkeypatch)
    assert names["features"].shape == (2048, (NUM_FRAMES - 16) // 4 + 1)
    assert names["features"].is_contiguous()
    # The window whose centre is 0.4 s begins at frame 4, and is the second.
    assert names["segments"].tolist() == [[-0.5, 6.25]]


def test_basnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load("thumos14-25fps", tmp_path, monkeypatch)
    assert names["features"].shape == (NUM_FRAMES * 25 // 30 // 16, 2048)
    assert names["seconds"][:2].tolist() == [0, 0.64]


def test_ms_tcn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load("ms-tcn", tmp_path, monkeypatch)
    assert names["array"].shape == (2048, NUM_FRAMES)
    assert names["features"].shape == (1, 2048, NUM_FRAMES - 2)


def test_captioning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load("video-features", tmp_path, monkeypatch)
    assert names["rgb"].shape == ((NUM_FRAMES - 1) // 64, 1024)
    assert names["event"].shape == (3, 1024)  # windows 1, 2 and 3 of 6
    assert names["fps"] == 30
    assert names["times"].tolist() == [1000 * 64 * place / 30 for place in range(1, 7)]


def test_rtfm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load("ten-crop", tmp_path, monkeypatch)
    assert names["array"].shape == (NUM_FRAMES // 16, 10, 2048)
    assert names["training"].shape == (10, 32, 2048)
    assert names["scores"].shape == (NUM_FRAMES // 16 * 16,)
