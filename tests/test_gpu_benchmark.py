"""The benchmark of a GPU: rehearsed on the CPU, and what it says where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402

from pipelines.tvl1 import TVL1Params  # noqa: E402


def run(*flags: str) -> str:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def rehearse(*flags: str) -> set[str]:
    """Names of the parts that a rehearsal has figures of."""
    out = run("--rehearse", "--json", "--seconds", "1000", *flags)
    assert "failed" not in out
    rows = json.loads(out.splitlines()[-1])
    assert all(row["value"] >= 0 for row in rows)
    return {row["part"] for row in rows}


def test_a_part_can_be_rehearsed_without_a_gpu() -> None:
    assert rehearse("--parts", "card", "flow") == {"card", "flow"}


@pytest.mark.soak
def test_every_part_can_be_rehearsed_without_a_gpu() -> None:
    assert rehearse() == {"card", "flow", "training", "inference", "extraction"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out == gpu.NO_GPU + "\n"


def test_a_part_that_fails_leaves_the_others_and_what_it_had_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(session: gpu.Session) -> object:
        yield gpu.Row("first", "rate", 5.0, "GB/s", 10.0, "the card")
        raise RuntimeError("broken")

    parts = [
        gpu.Part("first", fail, 1),
        gpu.Part("long", lambda session: [gpu.Row("long", "", 1.0, "")], 1000),
        gpu.Part("last", lambda session: [gpu.Row("last", "", 1.0, "")], 1),
    ]
    rows = gpu.run_parts(gpu.Session(gpu.Benchmark(seconds=60)), parts)
    assert [row.part for row in rows] == ["first", "last"]
    assert "first: failed, RuntimeError: broken" in (out := capsys.readouterr().out)
    assert "long: left out" in out
    assert "50%" in gpu.format_rows(rows)


def test_the_memory_ceiling_counts_each_plane_of_each_launch() -> None:
    params = TVL1Params(num_scales=1, num_warps=1, num_iterations=5, scale_step=0.5)
    assert gpu.bytes_of_pair((10, 10), params) == 4 * 100 * ((7 + 15 + 4) + 6 * 0.25 + 8)
