"""Counters of an extraction: what is counted for which step, what Prometheus gets, and what the dashboard asks for."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from fixtures_features import save_networks
from fixtures_jobs import NO_GPUS, succeed

from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.extraction import metrics
from pipelines.extraction.metrics import COUNTERS, STEPS, Stopwatch

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "extraction.json").read_text())
RAY_LABELS = {"NodeAddress", "SessionName"}  # that Ray itself puts on every metric


def test_each_step_counts_its_own_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    def decode() -> Iterator[int]:
        for frame in range(3):
            work(1)
            yield frame

    def flow(frames: Iterator[int]) -> Iterator[int]:
        for frame in frames:
            work(10)
            yield frame
        work(0.5)  # after the last frame

    clock = Stopwatch()
    with clock.of("encode"):
        work(0.25)
        for _ in clock.through("flow", flow(clock.through("decode", decode()))):
            work(100)
    assert clock.seconds == {"fetch": 0, "decode": 3, "flow": 30.5, "encode": 300.25, "features": 0, "commit": 0}


def test_the_time_of_a_step_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    clock = Stopwatch()
    with pytest.raises(OSError), clock.of("fetch"):
        raise OSError
    assert clock.seconds["fetch"] == 2


def queries() -> list[str]:
    """Every question that the dashboard asks Prometheus."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return asked + [variable["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]


def test_the_dashboard_names_only_metrics_and_labels_that_exist() -> None:
    text = " ".join(queries())
    assert set(re.findall(r"\bray_\w+", text)) == {f"ray_{name}_total" for name in COUNTERS}
    own = {label for _, labels in COUNTERS.values() for label in labels}
    asked = {label for labels in re.findall(r"by \(([^)]+)\)", text) for label in labels.split(", ")}
    filtered = set(re.findall(r"[{,]\s*(\w+)=", text))
    assert own <= asked
    assert asked | filtered <= own | RAY_LABELS


@pytest.mark.slow
def test_prometheus_gets_the_counters_of_an_extraction_and_of_features(ray_here: None, tmp_path: Path) -> None:
    write_motion_videos(tmp_path / "videos", videos_per_class=1, seed=0, num_frames=6, size=(48, 32))
    write_broken_videos(tmp_path / "videos" / "train" / "broken")
    videos = ("--videos", tmp_path / "videos", *NO_GPUS)
    succeed("extract_flow", *videos, "--output", tmp_path / "out")
    succeed("extract_features", *videos, *save_networks(tmp_path), "--window", "16", "--output", tmp_path / "features")
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    found: set[str] = set()
    steps: set[str] = set()
    while not {f"ray_{name}_total" for name in COUNTERS} <= found or steps != set(STEPS):
        assert time.monotonic() < deadline, found | steps
        time.sleep(0.5)
        with urllib.request.urlopen(address, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_extraction_")]
        found = {line.partition("{")[0] for line in lines}
        steps = {step for line in lines for step in re.findall(r'step="(\w+)"', line)}
    assert any('kind="' in line and line.startswith("ray_extraction_quarantined_total") for line in lines)
    assert all(label in lines[0] for label in RAY_LABELS)
